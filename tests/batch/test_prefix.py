"""Batches over what stands in S3: a prefix, a JSONL, and what must not be read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from inferq.storage import BatchStore, open_store
from inferq.storage.batches.lines import SourceUnusable
from inferq.storage.batches.sources import Sources
from tests.batch.conftest import BatchSite

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture
def pages(site: BatchSite, s3: S3Client, s3_url: str, bucket: str) -> str:
    """A bucket that batches may be fed from."""
    site.change(storage={"s3_endpoint_url": s3_url, "fetch_s3_buckets": (bucket,)})
    for key, body in {
        "in/b.png": b"2",
        "in/a 1.png": b"1",
        "in/empty.png": b"",
        "in/": b"",
        "x.png": b"x",
    }.items():
        s3.put_object(Bucket=bucket, Key=key, Body=body)
    return bucket


def test_each_object_under_a_prefix_is_a_line_and_later_ones_are_not(
    site: BatchSite, pages: str, s3: S3Client
) -> None:
    batch = site.batch_of(f"s3://{pages}/in/", task_type="ocr")
    source = site.services.sources.settle(batch)
    s3.put_object(Bucket=pages, Key="in/later.png", Body=b"3")
    assert site.services.sources.settle(batch) == source
    with site.services.sources.lines(source) as lines:
        found = [json.loads(line.content or b"") for line in lines]
    urls = [f"s3://{pages}/in/a 1.png", f"s3://{pages}/in/b.png"]
    assert [line["image_url"] for line in found] == urls
    assert [line["metadata"]["source"] for line in found] == urls
    assert source.total == 2


def test_what_the_store_itself_has_under_a_prefix_is_no_input(
    site: BatchSite, pages: str, s3: S3Client
) -> None:
    for key in ("own/tasks/default/t/result.json", "own/batches/b.json", "own-scans/a.png"):
        s3.put_object(Bucket=pages, Key=key, Body=b"{}")
    storage = site.services.storage.model_copy(update={"store_url": f"s3://{pages}/own"})
    store = open_store(storage)
    sources = Sources(store, BatchStore(store), storage)
    assert [found.key for found in sources.objects(f"s3://{pages}/own")] == ["own-scans/a.png"]
    everything = [found.key for found in sources.objects(f"s3://{pages}")]
    assert everything == ["in/a 1.png", "in/b.png", "own-scans/a.png", "x.png"]
    with pytest.raises(SourceUnusable, match="uploads of inferq"):
        sources.objects(f"s3://{pages}/own/tasks")


def test_a_jsonl_in_s3_is_copied(site: BatchSite, pages: str, s3: S3Client) -> None:
    s3.put_object(Bucket=pages, Key="tasks.jsonl", Body=b'{"payload": 1}\n{"payload": 2}')
    source = site.services.sources.settle(site.batch_of(f"s3://{pages}/tasks.jsonl"))
    s3.delete_object(Bucket=pages, Key="tasks.jsonl")
    with site.services.sources.lines(source) as lines:
        assert [line.content for line in lines] == [b'{"payload": 1}', b'{"payload": 2}']


@pytest.mark.parametrize(
    ("source", "more", "words"),
    [
        ("s3://PAGES/nothing/", {"task_type": "ocr"}, "no objects under"),
        ("s3://PAGES/gone.jsonl", {}, "there is no"),
        ("s3://other-bucket/in/", {"task_type": "ocr"}, "INFERQ_FETCH_S3_BUCKETS"),
        ("s3://PAGES/in/", {"task_type": "facefusion"}, "source_url and target_url"),
        ("s3://PAGES/in/", {"task_type": None}, "needs a task type"),
    ],
)
def test_a_prefix_that_cannot_be_used_says_why(
    site: BatchSite, pages: str, source: str, more: dict[str, str], words: str
) -> None:
    batch = site.batch_of(source.replace("PAGES", pages), **more)
    with pytest.raises(SourceUnusable, match=words):
        site.services.sources.settle(batch)


def test_a_bucket_that_does_not_let_us_says_why(site: BatchSite, pages: str) -> None:
    site.change(storage={"fetch_s3_buckets": ("not-there",)})
    batch = site.batch_of("s3://not-there/in/", task_type="ocr")
    with pytest.raises(SourceUnusable, match="does not exist or cannot be read"):
        site.services.sources.settle(batch)


@pytest.mark.parametrize("source", ["s3://secret/in/", "s3://secret/tasks.jsonl"])
def test_a_bucket_that_refuses_us_ends_the_batch_and_is_named(
    site: BatchSite, forbidding_s3: str, source: str
) -> None:
    site.change(storage={"s3_endpoint_url": forbidding_s3, "fetch_s3_buckets": ("secret",)})
    summary = site.finish(site.batch_of(source, task_type="ocr"))
    assert summary.state == "failed"
    assert summary.error is not None
    assert "bucket 'secret'" in summary.error
    assert "the credentials need s3:ListBucket and s3:GetObject" in summary.error
