"""What containers have in real life, each before and after: the table of docs/checkpoint.md is made of these."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.linux.capability import permitted_set
from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci
from tests.helpers.scenario import Parked, Scenario

pytestmark = pytest.mark.ferry
HAS_SYS_RESOURCE = "CAP_SYS_RESOURCE" in permitted_set()


def _mount(destination: str, kind: str, *options: str) -> dict[str, object]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _time_namespace(config: Config) -> None:
    config["linux"]["namespaces"].append({"type": "time"})
    config["linux"]["timeOffsets"] = {"monotonic": {"secs": 500000, "nanosecs": 0}, "boottime": {"secs": 500000, "nanosecs": 0}}


def _capabilities(config: Config, *names: str) -> None:
    for kind in ("bounding", "effective", "permitted"):
        config["process"]["capabilities"][kind] += names


def _user_namespace(config: Config) -> None:
    config["linux"]["namespaces"].append({"type": "user"})
    for kind in ("uidMappings", "gidMappings"):
        config["linux"][kind] = [{"containerID": 0, "hostID": 0, "size": 65536}]


def _users(config: Config) -> None:
    _capabilities(config, "CAP_SETUID", "CAP_SETGID")
    if not HAS_SYS_RESOURCE:  # CRIU could not read the limits of others; test_findings sees that this is told
        _user_namespace(config)


def _mapped_users(config: Config) -> None:
    config["linux"]["namespaces"].append({"type": "user"})
    for kind in ("uidMappings", "gidMappings"):
        config["linux"][kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    _capabilities(config, "CAP_CHOWN")


def _limited(config: Config) -> None:
    config["linux"]["resources"].update(pids={"limit": 77}, memory={"limit": 1 << 28})


SCENARIOS = [
    Scenario("threads", """
        seen = {}
        def run(n):
            while True: seen[n] = (seen.get(n, (0,))[0] + 1, threading.get_native_id()); time.sleep(0.005)
        threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(5)]
        for t in threads: t.start()
        time.sleep(0.1); park(); before = dict(seen); time.sleep(0.2)
        assert len(seen) == 5 and all(seen[n][0] > before[n][0] and seen[n][1] == before[n][1] for n in seen)
    """),
    Scenario("sessions and process groups", """
        r, w = os.pipe()
        def child(act):
            pid = os.fork()
            if pid == 0: act(); os.write(w, b'.'); signal.pause(); os._exit(0)
            return pid
        a = child(os.setsid); b = child(lambda: os.setpgid(0, 0)); c = child(lambda: None)
        for _ in range(3): os.read(r, 1)
        def look(): return [(os.getsid(p), os.getpgid(p)) for p in (0, a, b, c)]
        before = look(); park(); assert look() == before, (look(), before)
        for p in (a, b, c): os.kill(p, 9); assert os.waitpid(p, 0) == (p, 9)
    """),
    Scenario("zombies", """
        p = os.fork()
        if p == 0: os._exit(42)
        while open(f'/proc/{p}/stat').read().split()[2] != 'Z': time.sleep(0.01)
        park()
        assert open(f'/proc/{p}/stat').read().split()[2] == 'Z'
        assert os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) == 42
    """),
    Scenario("signals, timers and limits", """
        got = []
        signal.signal(signal.SIGUSR1, lambda *a: got.append('usr1'))
        signal.signal(signal.SIGALRM, lambda *a: got.append('alarm'))
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); os.kill(os.getpid(), signal.SIGUSR1)
        resource.setrlimit(resource.RLIMIT_NOFILE, (321, 512)); os.umask(0o027); os.chdir('/usr/lib'); os.nice(3)
        signal.setitimer(signal.ITIMER_REAL, 1000, 0.05); park()
        assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
        assert not got and signal.SIGUSR1 in signal.sigpending()
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]); signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.2); assert got == ['usr1', 'alarm'], got
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (321, 512) and os.umask(0) == 0o027
        assert os.getcwd() == '/usr/lib' and os.nice(0) == 3
    """),
    Scenario("pipes", """
        r, w = os.pipe(); os.write(w, b'queued' * 1000); fcntl.fcntl(w, 1031, 1 << 18); os.set_blocking(r, False); park()
        assert os.read(r, 10000) == b'queued' * 1000 and fcntl.fcntl(w, 1032) == 1 << 18 and not os.get_blocking(r)
        os.write(w, b'more'); assert os.read(r, 10) == b'more'
    """),
    Scenario("FIFOs", """
        os.mkfifo('/fifo'); f = os.open('/fifo', os.O_RDWR); os.write(f, b'queued'); park()
        assert os.read(f, 10) == b'queued'
        g = os.open('/fifo', os.O_WRONLY); os.write(g, b'by name'); assert os.read(f, 10) == b'by name'
    """),
    Scenario("unix socket pairs", """
        pairs = [socket.socketpair(socket.AF_UNIX, k) for k in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)]
        for a, b in pairs: a.send(b'one'); a.send(b'two')
        a, b = socket.socketpair(); f = os.open('/etc/passwd', os.O_RDONLY)
        socket.send_fds(a, [b'a file'], [f]); os.close(f); park()
        assert pairs[0][1].recv(10) == b'onetwo'
        for x, y in pairs[1:]: assert [y.recv(10), y.recv(10)] == [b'one', b'two']
        data, fds, _, _ = socket.recv_fds(b, 10, 1); assert data == b'a file' and os.read(fds[0], 5) == b'root:'
    """),
    Scenario("named unix sockets", """
        s = socket.socket(socket.AF_UNIX); s.bind('/sock'); s.listen()
        c = socket.socket(socket.AF_UNIX); c.connect('/sock'); t, _ = s.accept(); c.send(b'queued')
        n = socket.socket(socket.AF_UNIX); n.bind('\\0abstract'); n.listen()
        d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); d.bind('/dgram')
        e = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); e.sendto(b'letter', '/dgram'); park()
        assert t.recv(10) == b'queued' and d.recv(10) == b'letter'
        for name in ('/sock', '\\0abstract'):
            x = socket.socket(socket.AF_UNIX); x.connect(name)
            y, _ = (s if name == '/sock' else n).accept(); x.send(b'new'); assert y.recv(10) == b'new'
    """),
    Scenario("TCP, listening", """
        s = socket.create_server(('127.0.0.1', 77), backlog=7); t = socket.create_server(('::1', 77), family=socket.AF_INET6)
        t.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1); park()
        assert t.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for x, a in ((s, '127.0.0.1'), (t, '::1')):
            c = socket.create_connection((a, 77)); d, _ = x.accept(); c.send(b'x'); assert d.recv(1) == b'x'
    """),
    Scenario("TCP, established", """
        pairs = []
        for family, a in ((socket.AF_INET, '127.0.0.1'), (socket.AF_INET6, '::1')):
            s = socket.create_server((a, 77), family=family); c = socket.create_connection((a, 77)); d, _ = s.accept()
            c.send(b'queued' * 500); c.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1); pairs.append((c, d))
        park()
        for c, d in pairs:
            data = b''
            while len(data) < 3000: data += d.recv(9999)
            assert data == b'queued' * 500 and c.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            d.send(b'answer'); assert c.recv(10) == b'answer'; c.close(); assert d.recv(1) == b''
    """, flags=("--tcp-established",), refused="tcp-established"),
    Scenario("TCP, established, to be closed", """
        s = socket.create_server(('127.0.0.1', 78)); t = socket.create_server(('127.0.0.1', 77))
        c = socket.create_connection(('127.0.0.1', 77)); d, _ = t.accept(); park()
        for x in (c, d):
            try: x.send(b'x'); raise SystemExit('the connection is there still')
            except OSError as e: assert e.errno in (errno.EPIPE, errno.ENOTCONN, errno.ECONNRESET), e
        c = socket.create_connection(('127.0.0.1', 78)); e, _ = s.accept()
    """, flags=("--tcp-close",), refused="tcp-established"),
    Scenario("UDP", """
        a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); a.bind(('127.0.0.1', 77))
        b = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); b.connect(('127.0.0.1', 77))
        c = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); c.bind(('::1', 77)); park()
        b.send(b'letter'); assert a.recv(10) == b'letter' and b.getpeername() == ('127.0.0.1', 77)
        d = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); d.sendto(b'six', ('::1', 77)); assert c.recv(10) == b'six'
    """),
    Scenario("netlink sockets", """
        s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0); s.bind((1234, 1)); park()
        assert s.getsockname() == (1234, 1)
        s.send(struct.pack('=IHHIIB3x', 20, 18, 0x301, 1, 0, 0)); assert len(s.recv(9999)) > 20
    """),
    Scenario("epoll, eventfd, timerfd, signalfd", """
        e = libc.eventfd(7, 0o4000); t = libc.timerfd_create(1, 0)
        spec = struct.pack('=qqqq', 0, 50_000_000, 1000, 0); libc.timerfd_settime(t, 0, spec, None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1]); mask = struct.pack('=Q', 1 << (signal.SIGUSR1 - 1)) + b'\\0' * 120
        s = libc.signalfd(-1, mask, 0); os.kill(os.getpid(), signal.SIGUSR1)
        r, w = os.pipe(); p = select.epoll(); p.register(r, select.EPOLLIN | select.EPOLLET); p.register(e, select.EPOLLIN); park()
        assert dict(p.poll(1)) == {e: select.EPOLLIN}; os.write(w, b'x'); assert dict(p.poll(1))[r] == select.EPOLLIN
        assert struct.unpack('=Q', os.read(e, 8)) == (7,)
        left = ctypes.create_string_buffer(32); libc.timerfd_gettime(t, left)
        seconds = struct.unpack('=qqqq', left.raw); assert seconds[:2] == (0, 50_000_000) and 900 < seconds[2] <= 1000, seconds
        assert struct.unpack('=I', os.read(s, 128)[:4]) == (signal.SIGUSR1,)
    """),
    Scenario("inotify", """
        os.mkdir('/watched'); n = libc.inotify_init1(0o4000); assert libc.inotify_add_watch(n, b'/watched', 0x100) == 1; park()
        try: os.read(n, 999)
        except BlockingIOError: pass
        open('/watched/new', 'w').close(); data = os.read(n, 999)
        assert struct.unpack('=iI', data[:8]) == (1, 0x100) and data[16:].rstrip(b'\\0') == b'new'
    """),
    Scenario("memfd", """
        f = os.memfd_create('mine', os.MFD_ALLOW_SEALING); os.write(f, b'content' * 10000); fcntl.fcntl(f, 1033, 2)
        m = mmap.mmap(f, 4096); os.lseek(f, 5, 0); park()
        assert os.lseek(f, 0, 1) == 5 and os.fstat(f).st_size == 70000 and fcntl.fcntl(f, 1034) & 2
        assert os.pread(f, 7, 69993) == b'content'; m[0:2] = b'CO'; assert os.pread(f, 7, 0) == b'COntent'
    """),
    Scenario("shared memory of parent and child", """
        m = mmap.mmap(-1, 1 << 20); m[:3] = b'abc'; p = os.fork()
        if p == 0:
            while m[3:4] != b'!': time.sleep(0.01)
            m[:3] = b'xyz'; os._exit(0)
        park(); assert m[:3] == b'abc'; m[3:4] = b'!'; assert os.waitpid(p, 0)[1] == 0 and m[:3] == b'xyz'
    """),
    Scenario("System V IPC", """
        libc.shmat.restype = ctypes.c_void_p
        s = libc.shmget(0x77, 8192, 0o1600); at = libc.shmat(s, None, 0); ctypes.memmove(at, b'shared', 6)
        sem = libc.semget(0x78, 2, 0o1600); libc.semctl(sem, 1, 16, 5)
        q = libc.msgget(0x79, 0o1600); assert libc.msgsnd(q, struct.pack('=q', 3) + b'letter', 6, 0) == 0; park()
        assert ctypes.string_at(at, 6) == b'shared' and libc.shmget(0x77, 8192, 0) == s
        assert libc.semget(0x78, 2, 0) == sem and libc.semctl(sem, 1, 12) == 5
        b = ctypes.create_string_buffer(14); assert libc.msgrcv(libc.msgget(0x79, 0), b, 6, 3, 0) == 6 and b.raw[8:] == b'letter'
    """),
    Scenario("POSIX shared memory", """
        f = os.open('/dev/shm/mine', os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(f, 1 << 20); m = mmap.mmap(f, 1 << 20)
        m[:7] = b'content'; park()
        assert m[:7] == b'content' and open('/dev/shm/mine', 'rb').read(7) == b'content'
        m[:1] = b'C'; assert os.pread(f, 7, 0) == b'Content'
    """, change=lambda c: c["mounts"].append(_mount("/dev/shm", "tmpfs", "mode=1777"))
        if not any(m["destination"] == "/dev/shm" for m in c["mounts"]) else None),
    Scenario("file locks", """
        a = os.open('/a', os.O_RDWR | os.O_CREAT); fcntl.flock(a, fcntl.LOCK_EX)
        b = os.open('/b', os.O_RDWR | os.O_CREAT); fcntl.lockf(b, fcntl.LOCK_EX, 10, 5); park()
        p = os.fork()
        if p == 0:
            held = 0
            try: fcntl.flock(os.open('/a', os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError: held += 1
            x = os.open('/b', os.O_RDWR)
            try: fcntl.lockf(x, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 7)
            except BlockingIOError: held += 1
            fcntl.lockf(x, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 40); os._exit(held)
        assert os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) == 2
    """, flags=("--file-locks",), refused="file-locks"),
    Scenario("deleted files", """
        f = open('/gone', 'w+b'); f.write(b'content'); f.flush(); os.unlink('/gone')
        m = os.open('/mapped', os.O_RDWR | os.O_CREAT); os.write(m, b'm' * 5000); v = mmap.mmap(m, 5000); os.close(m); os.unlink('/mapped')
        os.mkdir('/d'); d = os.open('/d', os.O_RDONLY); os.rmdir('/d'); park()
        assert os.fstat(f.fileno()).st_nlink == 0 and os.pread(f.fileno(), 9, 0) == b'content' and f.tell() == 7
        assert v[4990:] == b'm' * 10 and not os.path.exists('/gone') and not os.path.exists('/mapped')
    """),
    Scenario("a deleted file beyond the ghost limit", """
        f = open('/gone', 'w+b'); f.write(os.urandom(1000) * 5000); f.flush(); os.unlink('/gone')
        before = os.pread(f.fileno(), 6_000_000, 0); park(); assert os.pread(f.fileno(), 6_000_000, 0) == before
    """),
    Scenario("an open file that lost one of its names", """
        f = open('/one', 'w+'); f.write('content'); f.flush(); os.link('/one', '/two'); os.unlink('/one'); park()
        assert os.fstat(f.fileno()).st_ino == os.stat('/two').st_ino and os.pread(f.fileno(), 9, 0) == b'content'
        assert os.fstat(f.fileno()).st_nlink == 1, 'a name for the time being was left'
    """, flags=("--link-remap",), refused="link-remap"),
    Scenario("open and mapped files", """
        open('/data', 'wb').write(b'0123456789' * 1000)
        a = os.open('/data', os.O_RDWR); os.lseek(a, 77, 0); b = os.dup(a); c = os.open('/data', os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        p = mmap.mmap(a, 8192, mmap.MAP_PRIVATE); p[0:3] = b'own'; s = mmap.mmap(a, 8192); d = os.open('/etc', os.O_RDONLY | os.O_DIRECTORY)
        o = os.open('/data', os.O_PATH); park()
        assert os.lseek(b, 1, 1) == 78 and os.lseek(a, 0, 1) == 78
        assert fcntl.fcntl(c, fcntl.F_GETFL) & os.O_APPEND and fcntl.fcntl(c, fcntl.F_GETFD) == 1
        assert p[0:4] == b'own3' and open('/data', 'rb').read(4) == b'0123'; s[5000] = 33; assert open('/data', 'rb').read()[5000] == 33
        assert 'passwd' in os.listdir(d) and os.fstat(o).st_size == 10000
    """),
    Scenario("pseudo-terminals", """
        m, s = os.openpty(); os.write(m, b'typed\\n'); fcntl.ioctl(s, 0x5414, struct.pack('=HHHH', 33, 99, 0, 0)); park()
        assert fcntl.ioctl(m, 0x5413, b'\\0' * 8)[:4] == struct.pack('=HH', 33, 99)
        os.write(m, b'more\\n'); data = b''
        while b'more\\n' not in data: data += os.read(s, 99)
    """),
    Scenario("tmpfs", """
        os.makedirs('/t/a/b'); open('/t/a/b/f', 'w').write('content'); os.link('/t/a/b/f', '/t/hard'); os.chown('/t/a/b/f', 7, 8); os.chmod('/t/a/b/f', 0o4711)
        os.symlink('b', '/t/a/l'); os.mkfifo('/t/fifo'); f = open('/t/open', 'w+'); f.write('held'); f.flush()
        park()
        x = os.stat('/t/a/l/f'); assert (x.st_mode & 0o7777, x.st_uid, x.st_gid, x.st_nlink) == (0o4711, 7, 8, 2), x
        assert os.stat('/t/hard').st_ino == x.st_ino and f.tell() == 4 and os.path.ismount('/t')
        v = os.statvfs('/t'); assert v.f_blocks * v.f_frsize == 1 << 22, (v, x)
    """, change=lambda c: (c["mounts"].append(_mount("/t", "tmpfs", "size=4m", "nosuid")), _capabilities(c, "CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID"))),
    Scenario("overlay mounts", """
        assert os.path.ismount('/over') and 'bash' in os.listdir('/over'); f = os.open('/over/bash', os.O_PATH); park()
        assert os.path.ismount('/over') and os.stat('/over/bash').st_ino == os.fstat(f).st_ino
    """, change=lambda c: c["mounts"].append(
        {"destination": "/over", "type": "overlay", "source": "overlay", "options": ["lowerdir=/usr/share:/usr/bin"]})),
    Scenario("POSIX message queues' file system", """
        assert os.path.ismount('/dev/mqueue'); park(); assert os.path.ismount('/dev/mqueue')
    """),
    Scenario("seccomp", """
        park()
        try: os.mkdir('/forbidden'); raise SystemExit('the filter is gone')
        except OSError as e: assert e.errno == 77, e
        assert 'Seccomp:\\t2' in open('/proc/self/status').read()
    """, change=lambda c: c["linux"].update(
        seccomp={"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77}]})),
    Scenario("credentials", """
        r, w = os.pipe(); p = os.fork()
        if p == 0:
            os.setgroups([5, 6]); os.setresgid(10, 11, 10); os.setresuid(1000, 1001, 1000); os.write(w, b'.')
            while True: time.sleep(1)
        os.read(r, 1)
        def look(): return [l for l in open(f'/proc/{p}/status') if l.startswith(('Uid', 'Gid', 'Groups', 'Cap', 'NoNewPrivs'))]
        before = look(); assert before[0] == 'Uid:\\t1000\\t1001\\t1000\\t1001\\n', before; park(); assert look() == before, (before, look())
    """, change=_users),
    Scenario("user namespaces", """
        before = open('/proc/self/uid_map').read(); assert before.split() == ['0', '100000', '65536'], before
        f = open('/file', 'w+'); f.write('content'); f.flush(); m = mmap.mmap(-1, 1 << 20); m[:3] = b'abc'
        s = socket.create_server(('127.0.0.1', 77)); park()
        assert open('/proc/self/uid_map').read() == before and os.getuid() == 0 and m[:3] == b'abc'
        os.chown('/file', 5, 6); assert os.fstat(f.fileno()).st_uid == 5; socket.create_connection(('127.0.0.1', 77))
    """, change=_mapped_users),
    Scenario("time namespaces", """
        before = time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME); assert before[0] > 500000
        park(); after = time.clock_gettime(time.CLOCK_MONOTONIC), time.clock_gettime(time.CLOCK_BOOTTIME)
        assert all(0 < a - b < 60 for a, b in zip(after, before)), (before, after)
    """, change=_time_namespace),
    Scenario("cgroup limits", """
        def look():
            return {p: open(p).read() for p in ('/sys/fs/cgroup/pids/pids.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes',
                                                '/sys/fs/cgroup/pids.max', '/sys/fs/cgroup/memory.max') if os.path.exists(p)}
        before = look(); assert '77\\n' in before.values() and str(1 << 28) + '\\n' in before.values(), before
        park(); assert look() == before
    """, change=_limited),
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_it_is_as_it_was(oci: Oci, bundles: BundleMaker, tmp_path: Path, scenario: Scenario) -> None:
    parked = Parked(oci, bundles, scenario)
    if scenario.refused:
        assert parked.findings().get(scenario.refused) == "fail"
        done = oci.run("checkpoint", "--image-path", tmp_path / "refused", "c")
        assert done.returncode == 1 and f"[{scenario.refused}]" in done.stderr, done.stderr
        assert oci.status("c") == "running"
    assert "fail" not in parked.findings(*scenario.flags).values(), parked.findings(*scenario.flags)
    oci.ok("checkpoint", *scenario.flags, "--image-path", tmp_path / "images", "c")
    parked.restore(tmp_path / "images")
    parked.looks()
