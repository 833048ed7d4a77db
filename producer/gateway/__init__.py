"""The HTTP gateway: tasks and files in, status, results and live events out."""

from inferq.producer.gateway.app import create_app
from inferq.producer.gateway.server import Server, listen, serve, url_of

__all__ = ["Server", "create_app", "listen", "serve", "url_of"]
