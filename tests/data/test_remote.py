import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dist_fusion.data.remote import expanded, fetched
from dist_fusion.data.shards import find_shards, read_records, write_shards
from dist_fusion.schema import UserError


class Host(BaseHTTPRequestHandler):
    """Serves a folder, with ranges; the first answer for a name in `breaking` ends in the middle."""

    def __init__(self, folder, breaking, asked, *rest):
        self.folder, self.breaking, self.asked = folder, breaking, asked
        super().__init__(*rest)

    def do_GET(self):
        name, start = self.path.lstrip("/"), 0
        self.asked.append((name, self.headers.get("Range")))
        if not (self.folder / name).is_file():
            return self.send_error(404)
        data = (self.folder / name).read_bytes()
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if name in self.breaking:
            self.breaking.remove(name)
            self.wfile.write(data[start : start + 1000])
            self.connection.close()
            return None
        return self.wfile.write(data[start:])

    def log_message(self, *words):
        pass


@pytest.fixture
def host(tmp_path):
    """(address, folder it serves, names whose first transfer breaks, what was asked)."""
    folder, breaking, asked = tmp_path / "served", [], []
    write_shards(folder, [(f"{n}", {"png": b"x" * 900, "txt": f"number {n}".encode()}) for n in range(6)], 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Host, folder, breaking, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder, breaking, asked
    server.shutdown()


def test_shards_at_addresses_are_fetched_once_and_read_like_others(host, tmp_path):
    address, folder, _, asked = host
    names = [f"{address}/{{00000..00002}}.tar"]
    shards = find_shards(names, cache=str(tmp_path / "cache"))
    assert [record.texts for record in read_records(shards)] == [(f"number {n}",) for n in range(6)]
    assert find_shards(names, cache=str(tmp_path / "cache")) == shards
    assert sorted(name for name, _ in asked) == sorted(path.name for path in folder.glob("*.tar"))


def test_a_broken_transfer_is_continued_from_where_it_broke(host, tmp_path):
    address, folder, breaking, asked = host
    breaking.append("00001.tar")
    (path,) = fetched([f"{address}/00001.tar"], tmp_path / "cache", trust=False, pauses=(0,))
    assert path.read_bytes() == (folder / "00001.tar").read_bytes()
    assert asked == [("00001.tar", None), ("00001.tar", "bytes=1000-")]


def test_an_address_without_a_shard_is_told(host, tmp_path):
    with pytest.raises(UserError, match=r"7\.tar cannot be had: HTTP Error 404"):
        fetched([f"{host[0]}/7.tar"], tmp_path / "cache", trust=False)
    assert not [*(tmp_path / "cache").glob("*.tar")]


def test_a_command_runs_only_where_it_is_trusted(host, tmp_path):
    _, folder, _, _ = host
    command = f"pipe:cat {folder}/00000.tar"
    with pytest.raises(UserError, match="trust_shards=true"):
        find_shards([command], cache=str(tmp_path / "cache"))
    (shard,) = find_shards([command], cache=str(tmp_path / "cache"), trust=True)
    assert [record.texts for record in read_records([shard])] == [("number 0",), ("number 1",)]
    with pytest.raises(UserError, match="cannot be had"):
        fetched(["pipe:exit 3"], tmp_path / "cache", trust=True, pauses=())


def test_ranges_of_numbers_are_written_out():
    assert expanded("a{08..10}.tar") == ["a08.tar", "a09.tar", "a10.tar"]
    assert expanded("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    assert expanded("plain.tar") == ["plain.tar"]
    with pytest.raises(UserError, match=r"\{000\.\.099\}"):
        expanded("http://host/{a,b}.tar")
