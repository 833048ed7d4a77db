"""Reading input URLs, and which addresses they may lead to: pure, and attacked."""

from __future__ import annotations

import base64
import socket
from ipaddress import ip_network
from typing import Any
from unittest.mock import Mock

import httpcore
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.schemas import InvalidTask
from inferq.schemas.http_url import HttpUrl, parse_http_url
from inferq.schemas.s3_url import split_s3_url
from inferq.storage.fetch.addresses import AddressPolicy, AddressRefused, GuardedBackend
from inferq.storage.fetch.urls import read_data_url, redacted, redirect_url
from inferq.storage.objects.store import ObjectStore

PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "93.184.216.34",
    "2606:4700::1111",
    "2a00:1450::1",
    "64:ff9b::8.8.8.8",
    "::ffff:8.8.8.8",
]
SPECIAL = [
    "0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1",
    "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255",
    "240.0.0.1", "255.255.255.255", "168.63.129.16", "::", "::1", "::7f00:1", "::ffff:127.0.0.1",
    "::ffff:10.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::8.8.8.8", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1",
    "3fff::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1",
    "not an address", "", "127.1", "2130706433",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_permitted(address: str) -> None:
    assert AddressPolicy().permits(address)


@pytest.mark.parametrize("address", SPECIAL)
def test_special_addresses_are_not(address: str) -> None:
    assert not AddressPolicy().permits(address)


def test_an_operator_may_allow_a_network() -> None:
    policy = AddressPolicy([ip_network("10.1.0.0/16"), ip_network("fd00::/8")])
    assert policy.permits("10.1.2.3")
    assert policy.permits("::ffff:10.1.2.3")
    assert policy.permits("fd12::1")
    assert not policy.permits("10.2.0.1")
    assert not policy.permits("fe80::1")


@given(st.ip_addresses())
def test_what_python_calls_private_is_never_permitted(address: Any) -> None:
    if AddressPolicy().permits(str(address)):
        ip = getattr(address, "ipv4_mapped", None) or address
        assert not ip.is_loopback
        assert not ip.is_link_local
        assert not ip.is_multicast
        assert not ip.is_private


def test_only_permitted_addresses_of_a_host_are_used() -> None:
    policy = AddressPolicy()
    assert policy.check("h", ["10.0.0.1", "8.8.8.8"]) == ["8.8.8.8"]
    with pytest.raises(AddressRefused, match="no public address") as caught:
        policy.check("h", ["10.0.0.1", "::1"])
    assert caught.value.code == "address_refused"


def test_a_name_that_does_not_exist_is_refused_like_one_that_is_internal() -> None:
    def resolve(host: str, port: int) -> list[str]:
        if host == "internal.example":
            return ["10.0.0.1"]
        raise socket.gaierror(socket.EAI_NONAME if host == "absent.example" else socket.EAI_AGAIN, "x")

    backend = GuardedBackend(AddressPolicy(), resolve)
    said = []
    for name in ("internal", "absent"):
        with pytest.raises(AddressRefused) as caught:
            backend.connect_tcp(f"{name}.example", 80)
        said.append((caught.value.code, caught.value.message.replace(name, "")))
    assert said[0] == said[1]
    with pytest.raises(httpcore.ConnectError, match="cannot be resolved"):
        backend.connect_tcp("later.example", 80)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h", HttpUrl("http", "h", 80, "/")),
        ("HTTPS://Ex-Ample.COM:443/a%20b?q=%2F#frag", HttpUrl("https", "ex-ample.com", 443, "/a%20b?q=%2F")),
        ("http://h:8080?x", HttpUrl("http", "h", 8080, "/?x")),
        ("http://h:/", HttpUrl("http", "h", 80, "/")),
        ("http://h./", HttpUrl("http", "h", 80, "/")),
        ("http://[2606:4700::1]:81/x", HttpUrl("http", "2606:4700::1", 81, "/x")),
        (
            "http://bücher.example/ü?ü=é",
            HttpUrl("http", "xn--bcher-kva.example", 80, "/%C3%BC?%C3%BC=%C3%A9"),
        ),
        ("http://faß.de/", HttpUrl("http", "xn--fa-hia.de", 80, "/")),  # fass.de is somebody else's
        ("http://h/a?b?c#d?e", HttpUrl("http", "h", 80, "/a?b?c")),
        ("http://h//a//b", HttpUrl("http", "h", 80, "//a//b")),
        ("http://my_host/", HttpUrl("http", "my_host", 80, "/")),
        ("http://①②⑦.1/", HttpUrl("http", "127.1", 80, "/")),
    ],
)
def test_urls_are_taken_apart(url: str, expected: HttpUrl) -> None:
    assert parse_http_url(url) == expected


def test_user_and_password_become_basic_credentials() -> None:
    url = parse_http_url("http://us%40er:p%3Aw@h/")
    assert url.credentials
    assert base64.b64decode(url.credentials) == b"us@er:p:w"
    assert url.host == "h"


@pytest.mark.parametrize(
    "url",
    [
        "http://", "http:///path", "http://:80/", "http://?x", "http://user@/", "http:h/x",
        "http://h:0/", "http://h:65536/", "http://h:-1/", "http://h:8o/", "http://h:١/", "http://a..b/",
        "http://.h/", "http://-/", "http://h h/", "http://h/a b", "http://h\t/", "http://h/\r\nHost: x",
        "http://h\\@evil/", "http://h/\\x", "http://[::1", "http://::1/", "http://[::1%25lo]/",
        "http://[v1.x]/", "http://[1.2.3.4]/", "http://h,i/", "http://h%2f.evil/", "http://h%00/",
        "ftp://h/", "//h/", "http://" + "a" * 254, "http://" + "ü" * 64 + "/", "http://\ud800/",
        "http://h\u3002\u3002x/", "http://*/", "http://h!/",
    ],
)  # fmt: skip
def test_urls_with_two_readings_or_none_are_refused(url: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        parse_http_url(url)
    assert caught.value.code == "bad_input_url"


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for url in (text, "http://" + text, "http://h/" + text):
        try:
            parsed = parse_http_url(url)
        except InvalidTask:
            continue
        assert parsed.target.isascii()
        assert parsed.target.startswith("/")
        assert not set(parsed.target) & set(" \r\n\t#")
        assert 0 < parsed.port < 65536
        assert parsed.host.isascii()
        assert parsed.host


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/x", "https://h:1/x"),
        ("x y", "https://h:1/a/x%20y"),
        ("//other/x#f", "https://other/x"),
        ("?q", "https://h:1/a/b?q"),
        ("http://other", "http://other"),
        ("file:///etc/passwd", "file:///etc/passwd"),
    ],
)
def test_redirects_are_resolved_against_where_they_came_from(location: str, expected: str) -> None:
    assert redirect_url("https://h:1/a/b", location) == expected


def test_a_broken_redirect_is_refused() -> None:
    with pytest.raises(InvalidTask):
        redirect_url("https://h/", "http://[broken")


@pytest.mark.parametrize(
    ("url", "data", "content_type"),
    [
        ("data:,", b"", "text/plain;charset=US-ASCII"),
        ("data:,A%20brief+note", b"A brief+note", "text/plain;charset=US-ASCII"),
        ("data:image/png;base64,aGk=", b"hi", "image/png"),
        ("data:image/png;base64,aGk", b"hi", "image/png"),
        ("data:image/png;base64,%61Gk%3D", b"hi", "image/png"),
        ("data:;base64,_-8=", b"\xff\xef", "text/plain;charset=US-ASCII"),
        ("DATA:text/html;charset=utf-8,a,b;c", b"a,b;c", "text/html;charset=utf-8"),
        ("data:;charset=utf-8,x", b"x", "text/plain;charset=utf-8"),
        ("data:image/png;BASE64,aGk=\n", b"hi", "image/png"),
        ("data:base64,aGk=", b"aGk=", "base64"),
    ],
)
def test_data_urls_are_read(url: str, data: bytes, content_type: str) -> None:
    assert read_data_url(url) == (data, content_type)


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,a", "data:;base64,a$b=", "data:;base64,=aaa"]
)
def test_broken_data_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        read_data_url(url)
    assert caught.value.code == "bad_input_url"


@given(st.binary())
def test_base64_data_comes_back(data: bytes) -> None:
    url = "data:application/x;base64," + base64.b64encode(data).decode()
    assert read_data_url(url) == (data, "application/x")


def test_s3_keys_are_taken_literally() -> None:
    assert split_s3_url("s3://bucket/a/b c%20?x#y.png") == ("bucket", "a/b c%20?x#y.png")
    spaces = "Screenshot 9.41\u202fAM\u3000\u00a0\U0001f469\u200d\U0001f4bb.png"
    assert split_s3_url(f"s3://bucket/{spaces}") == ("bucket", spaces)


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3://b", "s3://bucket", "s3://bucket/", "s3:bucket/k", "s3://bu cket/k", "s3://user@bucket/k", "s3://bucket//",
     "s3://bucket/a/../b", "s3://bucket/./b", "s3://bucket/a\nb", "s3://../k"],
)  # fmt: skip
def test_odd_s3_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidTask):
        split_s3_url(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@h/p?token=secret#secret", "https://h/p?..."),
        ("https://h/p", "https://h/p"),
        ("https://a@secret@h/p@x", "https://h/p@x"),
        ("data:image/png;base64,secret", "data:image/png;base64,..."),
        ("s3://b/k", "s3://b/k"),
        ("http://h/\n\x1b[31m", "http://h/??[31m"),
        ("inferq:abc", "inferq:abc"),
    ],
)
def test_secrets_are_not_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


@given(st.text(alphabet="ab:/@?#.%", max_size=30))
def test_what_follows_a_question_mark_or_precedes_an_at_is_never_shown(text: str) -> None:
    assert "SECRET" not in redacted(f"https://user:SECRET@h/{text.replace('#', '')}?SECRET#{text}SECRET")
    assert len(redacted("http://h/" + text * 50)) <= 200


def test_a_key_may_have_empty_segments_and_still_not_lead_into_the_store() -> None:
    assert split_s3_url("s3://bucket//in//a.png") == ("bucket", "/in//a.png")
    store = Mock(spec=ObjectStore, location=lambda key: f"s3://bucket/own/{key}")
    for key, own in (("/own/tasks/x", True), ("own//x", True), ("//own/x", True), ("in//own/x", False)):
        assert ObjectStore.holds(store, f"s3://bucket/{key}") == own
