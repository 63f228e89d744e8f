"""An agent on another host, over paramiko: the control connection. The only importer of paramiko."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

import paramiko

from migrate.errors import AuthenticationFailed, ConnectionLost, HostKeyChanged, HostKeyUnknown, HostUnreachable
from migrate.host import Host
from migrate.liveness import DEAD_AFTER_S, PING_EVERY_S

_CONNECT_TIMEOUT_S = DEAD_AFTER_S
_DEAD_AFTER_MS = int(DEAD_AFTER_S * 1000)
_NOISE_BYTES = 4000


class _Refuse(paramiko.MissingHostKeyPolicy):
    """Never take an unknown host's word for who it is."""

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
        raise HostKeyUnknown(
            f"{hostname}: its {key.get_name()} host key is not known",
            hint=f"compare it, then connect once by hand: ssh {hostname}",
        )


class SshStream:
    """The stdin and stdout of a command on another host.

    Raises (from the constructor): HostUnreachable, HostKeyUnknown, HostKeyChanged, AuthenticationFailed.
    """

    def __init__(self, host: Host, command: str) -> None:
        self._host = host
        self.timeout_s: float | None = None
        self._client = paramiko.SSHClient()
        self._known = paramiko.HostKeys()
        for path in host.known_hosts:
            with contextlib.suppress(OSError):
                self._known.load(str(Path(path).expanduser()))
                self._client.load_system_host_keys(str(Path(path).expanduser()))
        self._client.set_missing_host_key_policy(_Refuse())
        sock = self._socket()
        try:
            self._connect(sock)
            transport = self._client.get_transport()
            assert transport is not None
            transport.set_keepalive(max(1, int(PING_EVERY_S)))
            self._channel = transport.open_session(window_size=4 << 20, timeout=_CONNECT_TIMEOUT_S)
            self._channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as e:
            self._client.close()
            raise HostUnreachable(f"{host.name}: the SSH session cannot be opened: {e}") from e
        except BaseException:
            self._client.close()
            raise

    def _socket(self) -> socket.socket | paramiko.ProxyCommand:
        host = self._host
        if host.proxy_command:
            return paramiko.ProxyCommand(host.proxy_command)
        try:
            sock = socket.create_connection((host.hostname, host.port), timeout=_CONNECT_TIMEOUT_S)
        except OSError as e:
            raise HostUnreachable(
                f"{host.name}: cannot connect to {host.hostname} port {host.port}: {e.strerror or e}",
                hint="does `ssh` reach it?",
            ) from e
        # With a keepalive under way, a dead network is an error within this time, not after the kernel's hours.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_AFTER_MS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _connect(self, sock: socket.socket | paramiko.ProxyCommand) -> None:
        host = self._host
        agent = host.identity_agent
        if agent and agent not in ("SSH_AUTH_SOCK", "none"):
            os.environ["SSH_AUTH_SOCK"] = str(Path(agent).expanduser())
        keys = [p for p in (str(Path(f).expanduser()) for f in host.identity_files) if Path(p).is_file()]
        # paramiko looks a host up as `name`, or `[name]:port`; OpenSSH by the alias alone where there is one.
        try:
            self._client.connect(
                host.host_key_alias or self._known_as(),
                port=22 if host.host_key_alias else host.port,
                username=host.user,
                key_filename=keys or None,  # type: ignore[arg-type]  # a list is documented, too
                allow_agent=not host.identities_only,
                look_for_keys=False,
                sock=sock,
                timeout=_CONNECT_TIMEOUT_S,
                banner_timeout=_CONNECT_TIMEOUT_S,
                auth_timeout=_CONNECT_TIMEOUT_S,
            )
        except paramiko.BadHostKeyException as e:
            raise HostKeyChanged(
                f"{host.name}: its host key has changed: {e.key.get_name()} {e.key.fingerprint}",
                hint="somebody may be listening; if the host was set up anew, remove its old key: ssh-keygen -R " + host.name,
            ) from e
        except paramiko.AuthenticationException as e:
            raise AuthenticationFailed(
                f"{host.name}: user {host.user} was not let in: {e}",
                hint="does `ssh -o BatchMode=yes` get in without asking?",
            ) from e
        except (paramiko.SSHException, OSError, EOFError) as e:
            if "No authentication methods" in str(e):
                raise AuthenticationFailed(
                    f"{host.name}: there is no key to show for user {host.user}",
                    hint="an agent, or IdentityFile in ~/.ssh/config",
                ) from e
            raise HostUnreachable(f"{host.name}: SSH with {host.hostname} port {host.port} failed: {e}") from e

    def _known_as(self) -> str:
        """The name under which known_hosts has the host: as typed, or what the configuration makes of it."""
        typed = self._host.name.rpartition("@")[2]
        port = self._host.port
        names = [self._host.hostname, typed]
        for name in names:
            if self._known.lookup(name if port == 22 else f"[{name}]:{port}"):
                return name
        return self._host.hostname

    def read_into(self, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[self.read_some(buffer) :]

    def read_some(self, buffer: memoryview) -> int:
        self._channel.settimeout(self.timeout_s)
        try:
            data = self._channel.recv(len(buffer))
        except TimeoutError as e:
            raise ConnectionLost(f"{self._host.name} did not answer in {self.timeout_s:.0f} s") from e
        except (paramiko.SSHException, OSError, EOFError) as e:
            raise ConnectionLost(f"connection to {self._host.name} is lost: {e}") from e
        if not data:
            raise ConnectionLost(f"connection to {self._host.name} is lost")
        buffer[: len(data)] = data
        return len(data)

    def write(self, data: bytes | memoryview) -> None:
        self._channel.settimeout(60)
        try:
            self._channel.sendall(bytes(data))
        except (paramiko.SSHException, OSError, EOFError) as e:
            raise ConnectionLost(f"connection to {self._host.name} is lost: {e}") from e

    def noise(self) -> str:
        """Return what the command wrote on stderr."""
        self._channel.settimeout(2)
        said = b""
        with contextlib.suppress(OSError):
            while len(said) < _NOISE_BYTES and (data := self._channel.recv_stderr(_NOISE_BYTES)):
                said += data
        return said[:_NOISE_BYTES].decode(errors="replace")

    def close(self) -> None:
        self._client.close()
