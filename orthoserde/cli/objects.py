"""Manifests and reports as the JSON objects of docs/reference/command-line.md."""

from __future__ import annotations

from collections.abc import Mapping

from orthoserde.comparison import DiffReport, Pair, TensorDifference
from orthoserde.comparison.distances import Distance, OnManifold
from orthoserde.conversion import ConversionReport
from orthoserde.manifest import Manifest, ParametrizedRecord
from orthoserde.plots import PlotReport
from orthoserde.reports import VerifyReport

#: An object that is written as JSON, numbers that JSON lacks still being numbers.
Object = dict[str, object]


def of_manifest(manifest: Manifest, path: str, file_bytes: int) -> Object:
    """What ``inspect`` says."""
    computed, training = manifest.computed_keys, set(manifest.training_keys)
    return {
        "command": "inspect",
        "path": path,
        "file_bytes": file_bytes,
        "has_configuration": manifest.has_configuration,
        "writer": dict(manifest.writer),
        "metadata": dict(manifest.metadata),
        "tensors": [
            {
                "key": key,
                "shape": record.shape,
                "dtype": record.dtype,
                "bytes": record.nbytes,
                "parameter": record.parameter if manifest.has_configuration else None,
                "requires_grad": record.requires_grad if manifest.has_configuration else None,
                "digest": record.digest,
                "role": "computed" if key in computed else "training" if key in training else "model",
            }
            for key, record in manifest.tensors.items()
        ],
        "parametrized": [_of_parametrized(record, manifest) for record in manifest.parametrized],
        "aliases": dict(manifest.aliases),
        "modules": [
            {"path": each.path, "kind": each.kind, "version": each.version, "config": each.config}
            for each in manifest.modules
        ],
        "left_out": manifest.left_out,
        "training": _of_training(manifest),
    }


def _of_parametrized(record: ParametrizedRecord, manifest: Manifest) -> Object:
    return {
        "name": record.name,
        "aliases": record.aliases,
        "shape": record.shape,
        "dtype": record.dtype,
        "parameter": record.parameter,
        "bytes": sum(manifest.tensors[key].nbytes for key in {manifest.kept_key(k) for k in record.tensor_keys()}),
        "keys": record.tensor_keys(),
        "chain": [
            {
                "kind": link.kind,
                "version": link.version,
                "config": link.config,
                "class": link.class_name,
                "stored": dict(link.tensors),
            }
            for link in record.chain
        ],
    }


def _of_training(manifest: Manifest) -> Object | None:
    training = manifest.training
    if training is None:
        return None
    return {
        "bytes": sum(manifest.tensors[key].nbytes for key in manifest.training_keys),
        "optimizers": {
            name: {
                "class": record.class_name,
                "groups": [{"parameters": group.parameters} for group in record.groups],
            }
            for name, record in training.optimizers.items()
        },
        "state": {name: entry.class_name for name, entry in training.state.items()},
        "generators": training.rng is not None,
    }


def of_verification(report: VerifyReport) -> Object:
    """What ``verify`` says."""
    return {
        "command": "verify",
        "path": report.path,
        "ok": report.ok,
        "has_configuration": report.has_configuration,
        "digests": report.digests,
        "tensors": report.tensors,
        "damaged": report.damaged,
        "residuals": dict(report.residuals),
        "off_constraint": report.off_constraint,
        "causes": dict(report.causes),
        "misfits": dict(report.misfits),
        "not_measured": dict(report.not_measured),
    }


def of_difference(report: DiffReport) -> Object:
    """What ``diff`` says."""
    return {
        "command": "diff",
        "a": report.paths[0],
        "b": report.paths[1],
        "same": report.same,
        "tolerance": report.tolerance,
        "model_only": report.model_only,
        "differs_in": report.differs_in,
        "identical": report.identical,
        "within_tolerance": len(report.within),
        "only_in_a": report.only[0],
        "only_in_b": report.only[1],
        "tensors": [_of_tensor(each, report.tolerance) for each in report.tensors.values()],
        "modules": _of_pairs(report.modules),
        "ties": _of_pairs(report.ties),
        "training": {
            where: _of_distance(each) if isinstance(each, Distance) else list(each)
            for where, each in report.training.items()
        },
        "metadata": _of_pairs(report.metadata),
        "notes": report.notes,
    }


def _of_tensor(each: TensorDifference, tolerance: float) -> Object:
    return {
        "name": each.name,
        "within_tolerance": each.within(tolerance),
        "kinds": each.kinds,
        "shapes": each.shapes,
        "dtypes": each.dtypes,
        "settings": _of_pairs(each.settings),
        "state": {role: _of_distance(distance) for role, distance in each.state.items()},
        "values": None if each.values is None else _of_distance(each.values),
        "manifold": None if each.manifold is None else _of_manifold(each.manifold),
        "not_compared": each.not_compared or None,
    }


def _of_pairs(found: Mapping[str, Pair]) -> Object:
    return {name: list(pair) for name, pair in found.items()}


def _of_distance(distance: Distance) -> Object:
    return {
        "identical": distance.identical,
        "largest": distance.largest,
        "relative": distance.relative,
        "not_comparable": distance.not_comparable,
    }


def _of_manifold(manifold: OnManifold) -> Object:
    return {"measure": manifold.measure, "largest_angle": manifold.largest_angle, "length": manifold.length}


def of_conversion(report: ConversionReport) -> Object:
    """What ``convert`` says."""
    return {
        "command": "convert",
        "source": report.source,
        "target": report.target,
        "to": report.form,
        "sort": report.sort,
        "source_bytes": report.source_bytes,
        "target_bytes": report.target_bytes,
        "tensors": report.tensors,
        "left_dense": report.left_dense,
        "notes": report.notes,
    }


def of_picture(report: PlotReport) -> Object:
    """What ``inspect --plot`` adds."""
    return {"path": report.path, "shown": report.shown, "left_out": dict(report.left_out)}
