from django.urls import path

from mysite import consumers, views

urlpatterns = [
    path("notify/<room>/<text>/", views.notify),
    path("job/<text>/", views.job),
]

websocket_urlpatterns = [
    path("sync/<room>/", consumers.SyncConsumer.as_asgi()),
    path("sync-json/<room>/", consumers.SyncJsonConsumer.as_asgi()),
    path("async/<room>/", consumers.AsyncConsumer.as_asgi()),
]
