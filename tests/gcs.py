"""A Cloud Storage of this machine: `gcp-storage-emulator` and what it leaves out, generations of objects.

    python -m tests.gcs PORT

Without preconditions (ifGenerationMatch, ifGenerationNotMatch) two jobs could both create one object, and without the
generation in its answers TensorStore does not read.
"""

import functools
import sys
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

BUCKET = "bucket"


def _generation(storage, bucket: str | None, name: str | None) -> str:
    """Of the object as it is; "0": there is none."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"]) if bucket and name else "0"
    except NotFound:
        return "0"


def _name(request) -> str | None:
    if "object_id" in request.params:
        return request.params["object_id"]
    if "name" in request.query:
        return request.query["name"][0]
    kind = request.query.get("uploadType", [""])[0]
    return request.data["meta"]["name"] if kind == "multipart" else (request.data or {}).get("name") if kind else None


def _checked(handler):
    """The emulator's handler, if what the request says of generations holds."""

    @functools.wraps(handler)
    def run(request, response, storage, *args, **kwargs):
        query, now = request.query, _generation(storage, request.params.get("bucket_name"), _name(request))
        if query.get("ifGenerationMatch", [now])[0] != now:
            response.status = HTTPStatus.PRECONDITION_FAILED
        elif query.get("ifGenerationNotMatch", [None])[0] == now:
            response.status = HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage, *args, **kwargs)
            if now != "0":
                response["X-Goog-Generation"] = now

    return run


def main() -> None:
    server.HANDLERS = tuple(
        (pattern, {method: _checked(handler) for method, handler in handlers.items()})
        for pattern, handlers in server.HANDLERS
    )
    server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=BUCKET).run()


if __name__ == "__main__":
    main()
