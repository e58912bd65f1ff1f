#!/bin/sh
# Certificates for tests of TLS, never for anything else: the keys aren't protected.
#
#   ssl/prepare-certs.sh [DIR]        (DIR: ssl/certs beside this script unless given)
#
# makes in DIR, where NAME.pem is a certificate and NAME-key.pem its key:
#
#   ca.pem           signed the certificates of server, other-host and client
#   server           for localhost, 127.0.0.1 and ::1
#   other-host       for other-host.example: a client that connects to localhost must refuse it
#   client           for clients of a broker that wants to see one (mutual TLS)
#   wrong-ca.pem     signed only wrong-client
#   wrong-client     a broker that trusts ca.pem must refuse it
#
# Does nothing if they are there and good for another day. Needs openssl only (1.1 or newer).
set -eu

dir=${1:-$(dirname "$0")/certs}
umask 077
mkdir -p "$dir"

certificates="ca server other-host client wrong-ca wrong-client"
for name in $certificates; do
  openssl x509 -in "$dir/$name.pem" -noout -checkend 86400 >/dev/null 2>&1 || missing=yes
done
[ -n "${missing:-}" ] || exit 0

# Made elsewhere and moved when complete, so that an interrupted run leaves no half of a set.
new=$(mktemp -d "$dir/new.XXXXXX")
exec 3>&2 2>"$new/log" # openssl is talkative; shown only when something fails
trap 'status=$?; [ $status = 0 ] || cat "$new/log" >&3; rm -rf "$new"' EXIT
trap 'exit 1' HUP INT TERM

# The subject comes from -subj; extensions such as newer Pythons demand them (RFC 5280).
cat >"$new/openssl.cnf" <<'END'
[req]
distinguished_name = subject
[subject]
[ca]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:localhost, IP:127.0.0.1, IP:::1
[other-host]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature, keyEncipherment
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = DNS:other-host.example
[client]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END

make_ca() { # NAME
  openssl req -x509 -newkey rsa:2048 -nodes -sha256 -days 3650 -config "$new/openssl.cnf" \
    -extensions ca -subj "/CN=channels_rabbitmq tests, $1" \
    -keyout "$new/$1-key.pem" -out "$new/$1.pem"
}

make_certificate() { # NAME CA EXTENSIONS
  openssl req -new -newkey rsa:2048 -nodes -sha256 -config "$new/openssl.cnf" \
    -subj "/CN=channels_rabbitmq tests, $1" -keyout "$new/$1-key.pem" -out "$new/$1.csr"
  openssl x509 -req -in "$new/$1.csr" -CA "$new/$2.pem" -CAkey "$new/$2-key.pem" -sha256 \
    -days 3650 -set_serial "0x$(openssl rand -hex 8)" -extfile "$new/openssl.cnf" \
    -extensions "$3" -out "$new/$1.pem"
}

make_ca ca
make_ca wrong-ca
make_certificate server ca server
make_certificate other-host ca other-host
make_certificate client ca client
make_certificate wrong-client wrong-ca client

rm "$new/ca-key.pem" "$new/wrong-ca-key.pem" # nobody signs any more
mv -f "$new"/*.pem "$dir"
echo "$dir: certificates made"
