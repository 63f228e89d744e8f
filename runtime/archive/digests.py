"""The digests of an archive's members, and their signature.

    ferry.digests      {"version": 1, "members": {NAME: "sha256:HEX", ...}}
    ferry.digests.sig  {"key": "ssh-ed25519 ...", "signature": BASE64} over the very bytes of ferry.digests

Keys are Ed25519 keys as ssh-keygen(1) makes them.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from runtime.archive.layout import DIGESTS, SIGNATURE
from runtime.errors import ContainerError, SpecError, UsageError

# What is signed says what it is, so that no signature of this key over anything else can be put here.
_PURPOSE = b"ferry checkpoint archive\0"


def document(members: dict[str, str]) -> bytes:
    return json.dumps({"version": 1, "members": members}, indent=1).encode()


def check(data: bytes | None, found: dict[str, str]) -> None:
    """Compare the digests of what was found with those that the archive names. Raises: ContainerError naming the member."""
    if data is None:
        return
    try:
        members = json.loads(data)["members"]
        wanted = {str(k): str(v) for k, v in members.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ContainerError(f"{DIGESTS}: is damaged: {e}") from e
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise ContainerError(f"the archive lacks {name}", hint="it is cut short, or somebody took that out")
        if name not in wanted:
            raise ContainerError(f"the archive has {name}, of which its digests know nothing")
        if wanted[name] != found[name]:
            raise ContainerError(f"{name} in the archive is damaged: its digest is {found[name]}, not {wanted[name]}")


def sign(data: bytes, key_file: Path) -> bytes:
    """Return the signature document of the digests. Raises: UsageError for what is no Ed25519 private key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = serialization.load_ssh_private_key(key_file.read_bytes(), password=None)
    except OSError as e:
        raise UsageError(f"--sign-key {key_file}: {e.strerror}") from e
    except Exception as e:
        raise UsageError(f"--sign-key {key_file}: is no private key without a passphrase: {e}") from e
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"--sign-key {key_file}: is no Ed25519 key", hint="ssh-keygen -t ed25519 -f FILE")
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return json.dumps({"key": public.decode(), "signature": base64.b64encode(key.sign(_PURPOSE + data)).decode()}).encode()


def verify(data: bytes | None, signature: bytes | None, key_file: Path) -> None:
    """See that one of the keys in a file signed the digests. Raises: ContainerError when none did; UsageError."""
    from cryptography.exceptions import InvalidSignature

    if data is None or signature is None:
        raise ContainerError("the archive is not signed", hint="leave --verify-key out to take it all the same")
    trusted = _public_keys(key_file)
    try:
        found = json.loads(signature)
        key, raw = _blob(found["key"]), base64.b64decode(found["signature"], validate=True)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise ContainerError(f"{SIGNATURE}: is damaged: {e}") from e
    if key not in trusted:
        raise ContainerError(f"the archive is signed by a key that {key_file} does not have: {found['key']}")
    try:
        trusted[key].verify(raw, _PURPOSE + data)
    except InvalidSignature:
        raise ContainerError(f"the signature of the archive's {DIGESTS} is not right: somebody changed it") from None


def _blob(line: str) -> str:
    """Return the key itself of a line of OpenSSH's."""
    return line.split()[1]


def _public_keys(key_file: Path) -> dict[str, Any]:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        lines = key_file.read_text().splitlines()
    except (OSError, ValueError) as e:
        raise UsageError(f"--verify-key {key_file}: {e}") from e
    found = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            try:
                key = load_ssh_public_key(line.encode())
            except Exception as e:
                raise SpecError(f"--verify-key {key_file}: {line[:40]!r} is no public key: {e}") from e
            if isinstance(key, Ed25519PublicKey):
                found[_blob(line)] = key
    if not found:
        raise UsageError(f"--verify-key {key_file}: has no Ed25519 key", hint="it is the .pub file of the key that signed")
    return found
