from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Frame(_message.Message):
    __slots__ = ("hello", "call", "reply", "failure", "event", "entry", "segment", "end_of_file", "end_of_tree")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    END_OF_FILE_FIELD_NUMBER: _ClassVar[int]
    END_OF_TREE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    call: Call
    reply: Reply
    failure: Failure
    event: Event
    entry: Entry
    segment: Segment
    end_of_file: EndOfFile
    end_of_tree: EndOfTree
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., event: _Optional[_Union[Event, _Mapping]] = ..., entry: _Optional[_Union[Entry, _Mapping]] = ..., segment: _Optional[_Union[Segment, _Mapping]] = ..., end_of_file: _Optional[_Union[EndOfFile, _Mapping]] = ..., end_of_tree: _Optional[_Union[EndOfTree, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "dead_after_ms")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEAD_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    dead_after_ms: int
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., dead_after_ms: _Optional[int] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("id", "verb", "arguments")
    ID_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    id: int
    verb: str
    arguments: str
    def __init__(self, id: _Optional[int] = ..., verb: _Optional[str] = ..., arguments: _Optional[str] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("id", "result")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    id: int
    result: str
    def __init__(self, id: _Optional[int] = ..., result: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("id", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    error: str
    def __init__(self, id: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("id", "name", "fields")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    name: str
    fields: str
    def __init__(self, id: _Optional[int] = ..., name: _Optional[str] = ..., fields: _Optional[str] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("path", "mode", "uid", "gid", "mtime_ns", "size", "rdev", "link_target", "hard_link_to", "xattrs", "removed", "patch")
    class XattrsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    PATH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    MTIME_NS_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    RDEV_FIELD_NUMBER: _ClassVar[int]
    LINK_TARGET_FIELD_NUMBER: _ClassVar[int]
    HARD_LINK_TO_FIELD_NUMBER: _ClassVar[int]
    XATTRS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    path: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    rdev: int
    link_target: bytes
    hard_link_to: bytes
    xattrs: _containers.ScalarMap[str, bytes]
    removed: bool
    patch: bool
    def __init__(self, path: _Optional[bytes] = ..., mode: _Optional[int] = ..., uid: _Optional[int] = ..., gid: _Optional[int] = ..., mtime_ns: _Optional[int] = ..., size: _Optional[int] = ..., rdev: _Optional[int] = ..., link_target: _Optional[bytes] = ..., hard_link_to: _Optional[bytes] = ..., xattrs: _Optional[_Mapping[str, bytes]] = ..., removed: _Optional[bool] = ..., patch: _Optional[bool] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("offset", "length", "packed")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    packed: bool
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ..., packed: _Optional[bool] = ...) -> None: ...

class EndOfFile(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    def __init__(self, digest: _Optional[bytes] = ...) -> None: ...

class EndOfTree(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: int
    def __init__(self, entries: _Optional[int] = ...) -> None: ...
