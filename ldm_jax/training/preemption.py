"""The notice of a machine of Google's cloud that it is about to be taken away, heard as a SIGTERM."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

_PRODUCT = Path("/sys/class/dmi/id/product_name")
_NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_HELD = 300  # seconds for which the metadata server holds a question back while there is nothing new
_PAUSE = 2.0  # seconds between two questions
_open = build_opener(ProxyHandler({})).open  # the server is the machine's own: no proxy knows it


def metadata_server() -> str | None:
    """The host, maybe with a port, that knows about this machine, or is named by GCE_METADATA_HOST; None outside of Google's cloud."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    try:
        return "metadata.google.internal" if _PRODUCT.read_text().startswith("Google") else None
    except OSError:
        return None


@contextmanager
def noticed() -> Iterator[None]:
    """Inside, a notice of preemption, or of maintenance that ends the machine, sends SIGTERM to this process. One that was there before is
    not news: whoever is started again on such a machine makes use of it as long as it is there."""
    if (host := metadata_server()) is None:
        yield
        return
    over, ending = threading.Event(), threading.Lock()

    def listen(name: str, notice: str) -> None:
        said, etag = notice, "0"
        while not over.is_set():
            query = f"wait_for_change=true&timeout_sec={_HELD}&last_etag={etag}"
            request = Request(f"http://{host}/computeMetadata/v1/instance/{name}?{query}", headers={"Metadata-Flavor": "Google"})
            try:
                with _open(request, timeout=2 * _HELD) as answer:
                    before, said, etag = said, answer.read().decode().strip(), answer.headers.get("ETag", "0")
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) and error.code == 404:
                    return  # the server that GKE gives to pods does not know; there the node tells them
            else:
                with ending:
                    if said == notice != before and not over.is_set():
                        os.kill(os.getpid(), signal.SIGTERM)
            over.wait(_PAUSE)

    for name, notice in _NOTICES.items():
        threading.Thread(target=listen, args=(name, notice), name=name, daemon=True).start()
    try:
        yield
    finally:
        with ending:
            over.set()
