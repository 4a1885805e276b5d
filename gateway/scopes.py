"""What an API key has to open for each method of the gateway."""

from collections.abc import Mapping

from protos.gateway.v1 import image_service_pb2
from rpc.access import Need

SCOPES = ("classify", "compare", "embed", "models", "triton")
"""All there are; ``triton`` is Triton's own protocol."""

_IMAGES = image_service_pb2.DESCRIPTOR.services_by_name["ImageService"].full_name

NEEDS: Mapping[str, str | Need] = {
    f"/{_IMAGES}/Classify": "classify",
    f"/{_IMAGES}/ClassifyBatch": "classify",
    f"/{_IMAGES}/ClassifyStream": "classify",
    f"/{_IMAGES}/Compare": "compare",
    f"/{_IMAGES}/Embed": "embed",
    f"/{_IMAGES}/ListModels": "models",
    "/inference.GRPCInferenceService/": "triton",
    # Orchestrators and load balancers have no keys.
    "/grpc.health.v1.Health/": Need.NOTHING,
    "/grpc.reflection.v1.ServerReflection/": Need.ANY_KEY,
    "/grpc.reflection.v1alpha.ServerReflection/": Need.ANY_KEY,
}
"""As of :class:`rpc.access.Access`; a method that is missing here is closed to every key."""
