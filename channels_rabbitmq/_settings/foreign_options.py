"""Options of other channel layers and other RabbitMQ clients, and what to write here instead.

Most unknown options in a ``CONFIG`` are those of ``channels_redis``, of kombu and Celery, or of
pika. An error that says only "unknown" would send the user to the manual for each of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping

_FORM = "amqp://user:password@host:port/vhost"

# Names of options, in lower case, by the answer that they get.
ANSWERS = {
    f'host takes its place: a URL, such as "{_FORM}", or a list of URLs, one for each node of a '
    "cluster": (
        *("hosts", "url", "urls", "uri", "dsn", "address", "addresses", "server", "servers"),
        *("nodes", "broker", "brokers", "broker_url", "broker_read_url", "broker_write_url"),
        *("amqp_url", "amqp_uri", "amqp_dsn", "rabbitmq_url", "cloudamqp_url", "location"),
        *("sentinels", "master_name", "sentinel_kwargs", "services"),
    ),
    f"it is a part of the URL in host: {_FORM}": (
        *("hostname", "port", "user", "username", "userid", "login", "password", "passwd"),
        *("credentials", "vhost", "virtual_host", "virtualhost", "db", "database"),
    ),
    "TLS comes with a URL in host that begins with amqps://; certificates are parameters of that "
    "URL (cacertfile, certfile, keyfile), or in an ssl.SSLContext for the option ssl_context": (
        *("ssl", "use_ssl", "broker_use_ssl", "tls", "use_tls", "ssl_options", "ssl_params"),
        *("ca_certs", "ssl_ca_certs", "cafile", "cacertfile", "ssl_cert_reqs", "verify"),
        *("certfile", "ssl_certfile", "keyfile", "ssl_keyfile", "server_name_indication"),
    ),
    f'it is a parameter of the URL in host, such as "{_FORM}?heartbeat=20"': (
        *("heartbeat", "broker_heartbeat", "heartbeat_interval", "channel_max"),
        *("auth_mechanism", "connection_kwargs", "transport_options"),
        *("broker_transport_options", "client_properties"),
    ),
    "connect_timeout takes its place for one attempt to connect, operation_timeout for one call "
    "(both in seconds)": (
        *("timeout", "connection_timeout", "broker_connection_timeout", "socket_timeout"),
        *("socket_connect_timeout", "stack_timeout", "blocked_connection_timeout"),
    ),
    "it isn't needed, the layer connects again for as long as it takes; remove it": (
        *("retry", "retries", "max_retries", "retry_delay", "retry_on_timeout", "retry_policy"),
        *("connection_attempts", "reconnect", "reconnect_interval", "reconnect_delay"),
        *("broker_connection_retry", "broker_connection_retry_on_startup"),
        *("broker_connection_max_retries", "health_check_interval", "failover_strategy"),
    ),
    "groups_exchange takes its place: projects on the same virtual host need different names; or "
    "give each a virtual host of its own": (
        *("prefix", "key_prefix", "namespace", "exchange", "exchange_name", "default_exchange"),
        *("group_exchange", "topic", "stats_prefix"),
    ),
    "local_capacity takes its place: how many messages RabbitMQ sends before it has seen an ack": (
        *("prefetch", "prefetch_count", "worker_prefetch_multiplier", "qos"),
    ),
    "remote_capacity takes its place: how many messages may wait on RabbitMQ for a process": (
        *("max_length", "maxlen", "max_len", "queue_max_length", "x-max-length"),
    ),
    "expiry takes its place: how many seconds a message may wait on RabbitMQ": (
        *("ttl", "message_ttl", "x-message-ttl", "message_expiry", "expiration"),
    ),
    "it isn't needed, RabbitMQ keeps equal messages apart; remove it": ("random_prefix_length",),
    'serializer takes its place: "msgpack", "json", or a class with serialize() and deserialize(), '
    "or its dotted path": (
        *("serializer_format", "serializer_class", "task_serializer", "result_serializer"),
        *("accept_content",),
    ),
    "it isn't needed, the layer names and declares its queues by itself; remove it": (
        *("queue", "queues", "queue_name", "queue_prefix", "queue_arguments", "exchange_type"),
        *("durable", "auto_delete", "exclusive", "delivery_mode", "routing_key"),
    ),
    "it isn't needed, a process has two connections however many calls there are; remove it": (
        *("max_connections", "pool", "pool_size", "pool_limit", "broker_pool_limit"),
    ),
}
ANSWER_TO = {name: answer for answer, names in ANSWERS.items() for name in names}

OF_CHANNELS_REDIS = {"hosts", "prefix", "random_prefix_length", "serializer_format"}


def describe_unknown(option: object, known: Collection[str]) -> str:
    """Return what to write in place of an option that isn't among the ``known`` ones.

    The text shows the option only if it looks like a name: it could be a URL with a password.
    """
    everything = f"known are {', '.join(known)}"
    if not isinstance(option, str):
        return f"an option's name must be a str, not {type(option).__qualname__}; {everything}"
    if not re.fullmatch("[A-Za-z0-9_. -]{1,60}", option):
        return f"unknown option, with a name like no option's (it isn't shown here); {everything}"
    answer = ANSWER_TO.get(option.lower())
    if answer is not None:
        return f"unknown option {option!r}: {answer}"
    nearest = difflib.get_close_matches(option.lower(), known, n=1)
    return f"unknown option {option!r}; {f'did you mean {nearest[0]}?' if nearest else everything}"


def notes_for(config: Mapping[str, object]) -> Iterator[str]:
    """Return remarks on valid options, for an error about other options in ``CONFIG``."""
    if "group_expiry" in config:
        yield "group_expiry is ignored, a membership needs none here; remove it"
    capacities = " and ".join(name for name in ("capacity", "channel_capacity") if name in config)
    if capacities and not OF_CHANNELS_REDIS.isdisjoint(config):
        yield (
            f"{capacities}: not quite what channels_redis has by this name. Here it limits what a "
            "process keeps for a channel that is behind, if only for a moment after a burst, and "
            "remote_capacity limits what waits on RabbitMQ for all channels of a process together"
        )
