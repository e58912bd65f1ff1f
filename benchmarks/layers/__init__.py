"""One module for each thing that is measured.

Each has the same names: TITLE and REQUIREMENTS (what pip installs into its environment; None: an
environment that is there anyway), PACKAGES (whose versions the results show), SERVER ("rabbitmq" or
"redis"), ``async open_layer(url, capacity)`` and ``async close_layer(layer)``. Nothing but
these two functions needs the environment: the coordinator imports the modules too.
"""
