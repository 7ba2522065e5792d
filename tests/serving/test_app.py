"""The server over real connections, with a detector whose answers tell which image it was given."""

import pytest

pytest.importorskip("starlette", reason="The extra `serve` is not installed.")

import base64
import concurrent.futures
import hashlib
import re
import socket
import threading
import time

from pictures import plain, png
from served import FakeDetector, ask, served

from hpr_jax.serving import connections
from hpr_jax.serving.app import PAGE
from hpr_jax.serving.limits import Limits

FORM = "multipart/form-data"
PICTURE = png(plain(20, 30, (60, 10, 0)))


@pytest.fixture(scope="module")
def port():
    with served(FakeDetector()) as port:
        yield port


def form(data, name="image", kind="file"):
    """A form with a field and a file, as browsers send it, and its Content-Type."""
    filename = '; filename="a.png"' if kind == "file" else ""
    head = f'Content-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
    field = 'Content-Disposition: form-data; name="more"\r\n\r\ntext'
    body = b"--xyz\r\n" + field.encode() + b"\r\n--xyz\r\n" + head.encode() + data + b"\r\n--xyz--\r\n"
    return body, f"{FORM}; boundary=xyz"


class TestDetect:
    def test_what_is_answered(self, port):
        status, headers, found = ask(port, "/detect", PICTURE)
        assert (status, headers["content-type"]) == (200, "application/json")
        assert 0 <= found.pop("seconds") < 20
        box = {"box": [0.0, 0.0, 60.0, 10.0], "score": pytest.approx(0.9), "label": 0, "name": "cup", "category_id": 2}
        assert found == {"height": 20, "width": 30, "detections": [box], "batch": 1}

    @pytest.mark.parametrize(("threshold", "names"), [("0", ["cup", "hat"]), ("0.1", ["cup", "hat"]), ("1", [])])
    def test_threshold(self, port, threshold, names):
        found = ask(port, f"/detect?threshold={threshold}", PICTURE)[2]
        assert [one["name"] for one in found["detections"]] == names

    def test_forms(self, port):
        body, kind = form(PICTURE)
        assert ask(port, "/detect", body, Content_Type=kind)[2]["detections"][0]["box"] == [0.0, 0.0, 60.0, 10.0]

    @pytest.mark.parametrize("kind", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded"])
    def test_types_of_images(self, port, kind):
        assert ask(port, "/detect", PICTURE, Content_Type=kind)[0] == 200

    def test_a_body_in_pieces_of_unknown_length(self, port):
        assert ask(port, "/detect", iter([PICTURE[:9], PICTURE[9:]]), method="POST")[0] == 200


class TestExplain:
    def test_what_is_answered(self, port):
        status, _, found = ask(port, "/explain?top=3", PICTURE)
        assert (status, found["height"], found["width"]) == (200, 20, 30)
        assert {name: len(layers) for name, layers in found["branches"].items()} == {"primary": 2, "dynamic_conv": 2}
        last = found["branches"]["dynamic_conv"][1]
        assert [one["query"] for one in last] == [3, 4, 5]
        assert [(one["name"], one["score"]) for one in last] == [("cup", 0.75), ("pen", 0.5), ("hat", 0.25)]

    def test_ten_queries_unless_asked_for_more(self, port):
        assert len(ask(port, "/explain", PICTURE)[2]["branches"]["primary"][0]) == 10


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("path", "body", "kind", "status", "sentence"),
        [
            ("/detect", b"", "", 400, "There is no image; send its bytes as the body, or as a file of a form."),
            ("/detect", b"junk", "", 415, "This is no JPEG, PNG, WebP, BMP or TIFF image, or it is damaged."),
            ("/detect", b"{}", "text/x", 415, "Send the bytes of an image, or a form with a file; this is text/x."),
            ("/detect?threshold=2", PICTURE, "", 400, "The threshold is a number from 0 to 1, not '2'."),
            ("/detect?threshold=nan", PICTURE, "", 400, "The threshold is a number from 0 to 1, not 'nan'."),
            ("/detect?threshold=", PICTURE, "", 400, "The threshold is a number from 0 to 1, not ''."),
            ("/explain?top=0", PICTURE, "", 400, "The top is a number from 1 to 100, not '0'."),
            ("/detect", *form(PICTURE, kind="text"), 400, "The form has no file; send one, as `curl -F image=@FILE` does."),
            ("/detect", form(PICTURE)[0], FORM, 400, "The form cannot be read: Missing boundary in multipart."),
            ("/detect", b"--no", f"{FORM}; boundary=xyz", 400, "The form cannot be read: Invalid multipart data."),
            ("/detect", png(plain(1, 1001, (0, 0, 0))), "", 422, "This detector takes no image of 1001x1 pixels."),
        ],
    )
    def test_images(self, port, path, body, kind, status, sentence):
        found = ask(port, path, body, **({"Content_Type": kind} if kind else {}))
        assert (found[0], found[2]) == (status, {"error": sentence})

    def test_failures_tell_nothing_of_the_machine(self, port):
        found = ask(port, "/detect", png(plain(13, 13, (0, 0, 0))))
        assert (found[0], found[2]) == (500, {"error": "The server could not do this; its log says why."})

    def test_compressed_bodies(self, port):
        assert ask(port, "/detect", PICTURE, Content_Encoding="gzip")[0] == 415

    @pytest.mark.parametrize(
        ("path", "method", "status"), [("/nothing", "GET", 404), ("/detect", "GET", 405), ("/", "PUT", 405)]
    )
    def test_other_addresses_and_methods(self, port, path, method, status):
        found = ask(port, path, method=method)
        assert found[0] == status
        assert found[2]["error"].endswith(".")

    def test_no_path_leads_to_files(self, port):
        for path in ("/../pyproject.toml", "/%2e%2e/app.py", "//etc/passwd", "/page.html", "/static/../app.py"):
            assert ask(port, path)[0] == 404

    @pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "", "[::1"])
    def test_other_names_of_this_machine(self, port, host):
        """A stranger's name may point here, and then its pages would be of the same origin."""
        status, _, found = ask(port, "/info", Host=host)
        assert (status, list(found)) == (421, ["error"]) if host != "[::1" else status in (200, 400, 421)

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000", "192.168.0.7"])
    def test_names_and_addresses_of_this_machine(self, port, host):
        assert ask(port, "/info", Host=host)[0] == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"},
        ],
    )
    def test_pages_of_others(self, port, headers):
        assert ask(port, "/detect", PICTURE, **headers)[0] == 403

    def test_its_own_page_and_links_from_others(self, port):
        host = f"127.0.0.1:{port}"
        assert ask(port, "/detect", PICTURE, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")[0] == 200
        assert ask(port, "/", Host=host, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200


class TestPage:
    def test_it_loads_nothing_and_runs_its_own_script_alone(self, port):
        status, headers, page = ask(port, "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert page == PAGE.read_text()
        assert not re.search(r"(src|href)=\"(?!info|data:,)|https?://(?!www\.w3\.org/2000/svg)|\bstyle=|\bon[a-z]+=", page)
        policy = headers["content-security-policy"]
        for tag in ("script", "style"):
            (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
            assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy

    def test_what_browsers_are_told_with_every_answer(self, port):
        for path in ("/", "/info", "/nothing"):
            headers = ask(port, path)[1]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cross-origin-resource-policy"] == "same-origin"
            assert not any(name.startswith("access-control") or name == "server" for name in headers)


def test_info(port):
    found = ask(port, "/info")[2]
    assert (found["detector"], found["classes"], found["explains"], found["batch_size"]) == (
        "tiny",
        ["cup", "pen", "hat"],
        True,
        4,
    )
    assert set(found["versions"]) == {"hpr_jax", "jax", "python"}
    assert found["limits"]["pixels"] == 50_000_000


def held(detector, port, count):
    """So many requests, of which the first is being computed: futures of their answers."""
    detector.hold.clear()
    pool = concurrent.futures.ThreadPoolExecutor(count)
    futures = [pool.submit(ask, port, "/detect", PICTURE) for _ in range(count)]
    until(lambda: ask(port, "/health")[2]["requests"] == count)
    return futures


def until(holds):
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


class TestMany:
    def test_none_is_lost_and_each_gets_its_own(self):
        detector = FakeDetector(batch_size=8)
        pictures = [png(plain(8, 8 if number % 3 else 200, (number, 255 - number, 0))) for number in range(100)]
        with served(detector) as port, concurrent.futures.ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(lambda picture: ask(port, "/detect", picture), pictures))
            sizes = ask(port, "/health")[2]["batches"]
        assert [answer[0] for answer in answers] == [200] * 100
        assert [answer[2]["detections"][0]["box"][2:] for answer in answers] == [[n, 255 - n] for n in range(100)]
        assert sum(int(size) * count for size, count in sizes.items()) == 100
        assert sizes["8"] > 3
        assert max(detector.batches) == 8

    def test_no_room_for_more_requests(self):
        detector = FakeDetector()
        with served(detector, Limits(requests=3)) as port:
            waiting = held(detector, port, 3)
            status, headers, found = ask(port, "/detect", PICTURE)
            assert (status, headers["retry-after"]) == (503, "1")
            assert found == {"error": "There is no room for more requests now; send it again later."}
            detector.hold.set()
            assert [one.result()[0] for one in waiting] == [200] * 3
            assert ask(port, "/detect", PICTURE)[0] == 200

    def test_no_room_for_more_bytes(self):
        detector = FakeDetector()
        with served(detector, Limits(memory=2 * len(PICTURE))) as port:
            waiting = held(detector, port, 2)
            assert ask(port, "/detect", PICTURE)[0] == 503
            detector.hold.set()
            assert [one.result()[0] for one in waiting] == [200] * 2
            assert ask(port, "/detect", PICTURE)[0] == 200

    def test_a_stopping_server_ends_what_it_has_begun(self):
        detector = FakeDetector()
        with served(detector) as port:
            waiting = held(detector, port, 2)
            threading.Timer(0.3, detector.hold.set).start()
        assert [one.result()[0] for one in waiting] == [200] * 2


class TestTime:
    def test_no_answer_in_time(self):
        detector = FakeDetector()
        with served(detector, Limits(seconds=0.2)) as port:
            detector.hold.clear()
            status, headers, found = ask(port, "/detect", PICTURE)
            detector.hold.set()
            assert (status, found) == (504, {"error": "There was no answer within 0.2 seconds."})
            assert "retry-after" in headers
            until(lambda: ask(port, "/detect", PICTURE)[0] == 200)

    def test_an_upload_that_does_not_end(self):
        with served(FakeDetector(), Limits(seconds=0.2)) as port:
            answer = send_raw(port, b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nabc")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"The upload took more than 0.2 seconds." in answer

    @pytest.mark.parametrize("head", [b"", b"POST /detect HTTP/1.1\r\nHost: "])
    def test_a_head_that_does_not_end(self, head, monkeypatch):
        monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
        with served(FakeDetector()) as port:
            assert send_raw(port, head) == b""

    def test_nothing_is_computed_for_clients_that_have_gone(self):
        detector = FakeDetector(batch_size=1)
        with served(detector) as port:
            waiting = held(detector, port, 1)
            gone = socket.create_connection(("127.0.0.1", port))
            gone.sendall(
                b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(PICTURE), PICTURE)
            )
            until(lambda: ask(port, "/health")[2]["requests"] == 2)
            gone.close()
            until(lambda: ask(port, "/health")[2]["requests"] == 1)
            detector.hold.set()
            assert waiting[0].result()[0] == 200
        assert detector.batches == [1]


def send_raw(port, data, timeout=10):
    """Sends bytes; returns all that is answered until the connection is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(data)
        received = b""
        while more := connection.recv(65536):
            received += more
        return received


@pytest.fixture(scope="module")
def strict_port():
    with served(FakeDetector(), Limits(upload=1000, pixels=10_000)) as port:
        yield port


class TestSize:
    def test_a_head_that_claims_too_much(self, strict_port):
        """The answer comes without the body, which a client that asks first need not send."""
        head = b"POST /detect HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 99999999999\r\n"
        answer = send_raw(strict_port, head + b"Expect: 100-continue\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"An upload may have 1,000 bytes, and this one has more; send a smaller image." in answer

    @pytest.mark.parametrize("body", [bytes(2_000_000), [bytes(500)] * 3])
    def test_a_body_that_is_too_large(self, strict_port, body):
        assert ask(strict_port, "/detect", iter(body) if isinstance(body, list) else body, method="POST")[0] == 413

    def test_an_image_that_is_too_large(self, strict_port):
        assert ask(strict_port, "/detect", png(plain(101, 100, (0, 0, 0))))[0] == 413

    @pytest.mark.parametrize(
        "head", [b"\x16\x03\x01" * 9 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, b"\r\n\r\n\r\n"]
    )
    def test_what_is_no_http(self, strict_port, head):
        assert send_raw(strict_port, head).startswith(b"HTTP/1.1 400 ")

    def test_lengths_that_are_none(self, strict_port):
        for length in (b"-1", b"x", b"1, 2", b"9" * 5000):
            answer = send_raw(
                strict_port, b"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + length + b"\r\n\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 400 ")
