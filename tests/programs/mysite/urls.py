from django.urls import path

from channels_rabbitmq import health, prometheus
from mysite import consumers, views

urlpatterns = [
    path("notify/<room>/<text>/", views.notify),
    path("job/<text>/", views.job),
    path("health/live", health.live),
    path("health/ready", health.ready),
    path("metrics", prometheus.metrics),
    path("metrics/sync", views.metrics_of_a_registry),
]

websocket_urlpatterns = [
    path("sync/<room>/", consumers.SyncConsumer.as_asgi()),
    path("sync-json/<room>/", consumers.SyncJsonConsumer.as_asgi()),
    path("async/<room>/", consumers.AsyncConsumer.as_asgi()),
]
