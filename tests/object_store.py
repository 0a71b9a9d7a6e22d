"""A server of S3 in this process. Where it is, AWS's own configuration says, to child processes too."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


@contextmanager
def object_store() -> Iterator[S3FileSystem]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    httpx.post(f"http://{host}:{port}/moto-api/reset").raise_for_status()  # of what an earlier one held
    keys = "aws_access_key_id = a\naws_secret_access_key = b\nregion = us-east-1\n"
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(f"[default]\n{keys}endpoint_url = http://{host}:{port}\n")
    S3FileSystem.clear_instance_cache()
    try:
        yield S3FileSystem(use_listings_cache=False)
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()


def make_bucket(store: S3FileSystem, name: str) -> None:
    """A bucket that keeps all versions of its objects: what is written twice has two."""
    store.mkdir(name)
    store.call_s3("put_bucket_versioning", Bucket=name, VersioningConfiguration={"Status": "Enabled"})


def num_versions(store: S3FileSystem, bucket: str) -> dict[str, int]:
    """How often each object was written."""
    found = store.call_s3("list_object_versions", Bucket=bucket).get("Versions", [])
    keys = [version["Key"] for version in found]
    return {key: keys.count(key) for key in keys}


def refuse_puts(store: S3FileSystem, bucket: str, objects: str) -> None:
    """Has the server refuse to write objects, by a pattern of their names."""
    refuse(store, bucket, objects, "s3:PutObject")


def refuse(store: S3FileSystem, bucket: str, objects: str, action: str) -> None:
    """Has the server refuse to do something to objects, by a pattern of their names."""
    refusal = {
        "Effect": "Deny",
        "Principal": "*",
        "Action": action,
        "Resource": f"arn:aws:s3:::{bucket}/{objects}",
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [refusal]})
    store.call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
