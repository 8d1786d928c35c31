"""The planner: pure Python, standard library only. Manifests in, a proven plan out."""

from refit.plan.classify import BULK, MISC, Classified
from refit.plan.errors import ConfigError, PlanError
from refit.plan.manifest import (
    Holding,
    Manifest,
    MiscReason,
    ParamSpec,
    RankManifest,
    TensorSpec,
    coalesce_holdings,
)
from refit.plan.match import Matcher
from refit.plan.naming import canonical, hf_name, hf_names
from refit.plan.options import DEFAULT_WHITELIST, PlanOptions
from refit.plan.placement import Mesh, Replicate, Shard, mesh_manifest, placed
from refit.plan.plan import Plan, Route, build_plan, replan
from refit.plan.rank_plan import Bucket, RankPlan, Round, Segment, StagePlan
from refit.plan.region import Region
from refit.plan.wire import decode_manifest, decode_rank_manifest, encode_manifest, encode_rank_manifest

__all__ = [
    "BULK",
    "DEFAULT_WHITELIST",
    "MISC",
    "Bucket",
    "Classified",
    "ConfigError",
    "Holding",
    "Manifest",
    "Matcher",
    "Mesh",
    "MiscReason",
    "ParamSpec",
    "Plan",
    "PlanError",
    "PlanOptions",
    "RankManifest",
    "RankPlan",
    "Region",
    "Replicate",
    "Round",
    "Route",
    "Segment",
    "Shard",
    "StagePlan",
    "TensorSpec",
    "build_plan",
    "canonical",
    "coalesce_holdings",
    "decode_manifest",
    "decode_rank_manifest",
    "encode_manifest",
    "encode_rank_manifest",
    "hf_name",
    "hf_names",
    "mesh_manifest",
    "placed",
    "replan",
]
