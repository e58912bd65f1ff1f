"""The one page of the chat."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache

from chat.rooms import ROOM_PATTERN, is_room


def index(request: HttpRequest) -> HttpResponse:
    """Go to the room asked for, or to the first."""
    room = request.GET.get("room", settings.CHAT_ROOMS[0]).strip()
    if not is_room(room):
        return HttpResponseBadRequest(
            "A room's name has up to 40 letters (a-z), digits, hyphens, underscores and periods, "
            "and starts with a letter or digit.",
            content_type="text/plain",
        )
    return redirect("room", room=room)


@never_cache
def room(request: HttpRequest, room: str) -> HttpResponse:
    rooms = settings.CHAT_ROOMS
    response = render(
        request,
        "chat/room.html",
        {
            "room": room,
            "rooms": rooms if room in rooms else [*rooms, room],
            "room_pattern": ROOM_PATTERN,
            "others": [
                address
                for address in settings.CHAT_ADDRESSES
                if not address.endswith("//" + request.get_host())
            ],
        },
    )
    # Nothing but our own files runs in the page, whatever people write.
    response["Content-Security-Policy"] = (
        "default-src 'self'; connect-src 'self' ws: wss:; base-uri 'none'; frame-ancestors 'none'"
    )
    return response
