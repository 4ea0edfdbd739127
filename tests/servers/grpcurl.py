"""What the examples need of grpcurl, for machines without it: `[-plaintext] [-d DATA] HOST WHAT`.

WHAT is `list`, `describe SYMBOL` or `package.Service/Method`. All it knows of the services comes
from reflection, as with the real one.
"""

import json
import sys
from collections.abc import Iterator

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


def messages(data: str) -> Iterator[object]:
    """The JSON values of a text, one after the other."""
    decoder, position = json.JSONDecoder(), 0
    while position < len(data):
        value, end = decoder.raw_decode(data, position)
        yield value
        position = end + len(data[end:]) - len(data[end:].lstrip())


def invoke(channel: grpc.Channel, pool: DescriptorPool, name: str, data: str) -> None:
    """Call a method and print its answers as JSON."""
    service, _, method_name = name.partition("/")
    method = pool.FindServiceByName(service).methods_by_name[method_name]
    request_class = message_factory.GetMessageClass(method.input_type)
    answer_class = message_factory.GetMessageClass(method.output_type)
    requests = (
        json_format.ParseDict(m, request_class(), descriptor_pool=pool) for m in messages(data)
    )
    kinds = {False: "unary", True: "stream"}
    kind = f"{kinds[method.client_streaming]}_{kinds[method.server_streaming]}"
    stub = getattr(channel, kind)(
        f"/{name}",
        request_serializer=request_class.SerializeToString,
        response_deserializer=answer_class.FromString,
    )
    answer = stub(requests if method.client_streaming else next(requests))
    for message in answer if method.server_streaming else (answer,):
        print(json_format.MessageToJson(message))


def main(arguments: list[str]) -> None:
    data = "{}"
    if arguments[:1] == ["-plaintext"]:
        arguments = arguments[1:]
    if arguments[:1] == ["-d"]:
        data, arguments = arguments[1], arguments[2:]
    host, what, *symbol = arguments
    with grpc.insecure_channel(host) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        if what == "list":
            print("\n".join(sorted(database.get_services())))
        elif what == "describe":
            for method in pool.FindServiceByName(symbol[0]).methods:
                print(f"rpc {method.name} ( {method.input_type.full_name} )")
        else:
            invoke(channel, pool, what, sys.stdin.read() if data == "@" else data)


if __name__ == "__main__":
    main(sys.argv[1:])
