"""Masks and images with their place on Earth: GeoTIFF, polygons as GeoJSON or GeoPackage, mosaics of tiles."""

import json
import logging
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.classes import IGNORE_INDEX, ClassTable
from ldm.data.images import read_image
from ldm.data.rasters import load_rasterio
from ldm.files import atomic_write
from ldm.util import UserError

Transform = Sequence[float]  # (a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f
GEOGRAPHIC = "EPSG:4326"  # longitude and latitude, the only system of GeoJSON (RFC 7946)
POLYGON_SUFFIXES = (".geojson", ".gpkg")
SAME_GRID = 1e-6  # relative; transforms that differ by less have the same pixels


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives the name under which a library writes a file, which becomes `path` if the block ends without an error."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def open_geotiff(path: Path, size: tuple[int, int], bands: int, crs: str | None, transform: Transform | None,
                 **options: Any) -> Iterator[Any]:
    """Open a GeoTIFF to write, which is there once the block has ended without an error.

    Args:
        path: the file.
        size: (height, width) in pixels.
        bands: number of uint8 bands.
        crs, transform: place of the upper left corner of the upper left pixel; None = none.
        options: further ones of rasterio.open, such as nodata.

    Yields:
        rasterio's dataset.
    """
    rasterio = load_rasterio()
    place = {} if transform is None else {"transform": rasterio.Affine(*transform)}
    with whole(path) as partial, rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(
        partial, "w", driver="GTiff", height=size[0], width=size[1], count=bands, dtype="uint8", crs=crs,
        compress="deflate", tiled=True, blockxsize=256, blockysize=256, bigtiff="if_safer", **place, **options,
    ) as dataset:  # fmt: skip
        yield dataset


def write_mask(path: Path, size: tuple[int, int], rows: Iterable[tuple[int, np.ndarray]], table: ClassTable,
               crs: str | None, transform: Transform | None) -> None:
    """Write a mask as a GeoTIFF that QGIS shows in the table's colours; 255 is its nodata.

    Args:
        path: .tif to write.
        size: (height, width) in pixels.
        rows: first row and (h, W) uint8 class ids of the table, as they come.
        table: the classes; their names become tags of the band, `CLASS_0` and so on.
        crs, transform: as of the image.
    """
    rasterio = load_rasterio()
    with open_geotiff(path, size, 1, crs, transform, nodata=IGNORE_INDEX) as dataset:
        palette = table.palette()
        dataset.write_colormap(1, {index: tuple(map(int, palette[index])) for index in (*table.ids, IGNORE_INDEX)})
        dataset.update_tags(1, **{f"CLASS_{index}": name for index, name in zip(table.ids, table.names, strict=True)})
        for top, mask in rows:
            dataset.write(mask, 1, window=rasterio.windows.Window(0, top, mask.shape[1], mask.shape[0]))


def write_polygons(mask_file: Path, path: Path, table: ClassTable) -> int:
    """Outline the regions of a mask, pixels touching along edges.

    Args:
        mask_file: GeoTIFF of write_mask.
        path: .geojson (longitude and latitude, as its standard asks for) or .gpkg (in the mask's own system).
        table: classes of the mask.

    Returns:
        The number of polygons; 255 has none.

    Raises:
        UserError: for GeoJSON of a mask without a coordinate system (see to_geographic).
    """
    rasterio = load_rasterio()
    from rasterio.features import shapes

    with rasterio.open(mask_file) as dataset:
        mask, transform, crs = dataset.read(1), dataset.transform, dataset.crs
    found = [(geometry, int(value)) for geometry, value in shapes(mask, mask != IGNORE_INDEX, transform=transform)]
    if path.suffix == ".gpkg":
        write_geopackage(path, found, table, crs)
        return len(found)
    outlines = to_geographic([geometry for geometry, _ in found], crs, mask_file)
    features = [{"type": "Feature", "geometry": {"type": one["type"], "coordinates": one["coordinates"]},
                 "properties": {"class": value, "name": table.names[value]}}
                for one, (_, value) in zip(outlines, found, strict=True)]  # fmt: skip
    atomic_write(path, json.dumps({"type": "FeatureCollection", "features": features}), is_synced=False)
    return len(found)


def to_geographic(geometries: list[Mapping[str, Any]], crs: Any, where: str | Path) -> list[Mapping[str, Any]]:
    """GeoJSON geometries in longitude and latitude; UserError naming `where` if crs has no such."""
    load_rasterio()
    from rasterio.warp import transform_geom

    reason = "no coordinate system"
    if crs is not None:
        try:
            return transform_geom(crs, GEOGRAPHIC, geometries, precision=9) if geometries else []
        except Exception as error:  # GDAL's errors, of classes that rasterio does not export
            reason = f"a coordinate system without longitudes and latitudes ({str(error)[:60]}...)"
    raise UserError(f"{where}: {reason}, which GeoJSON needs. Expected one in the image. Choose gpkg, or give the "
                    "image one with gdal_edit -a_srs.")


def write_geopackage(path: Path, found: Sequence[tuple[Mapping[str, Any], int]], table: ClassTable, crs: Any) -> None:
    """Write polygons (GeoJSON geometry, class id) as one layer of a GeoPackage; without crs it has none."""
    try:
        from pyogrio.raw import write
    except ImportError as error:
        raise UserError(f"{path}: GeoPackage needs pyogrio ({error}). Expected the packages of requirements/seg.txt. "
                        "Install them, or choose .geojson.") from error
    logging.getLogger("pyogrio").setLevel(logging.WARNING)  # it tells of every file
    with whole(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'crs' was not provided", UserWarning)
        write(partial, np.array([to_wkb(geometry) for geometry, _ in found], object),
              [np.array([value for _, value in found], np.int32),
               np.array([table.names[value] for _, value in found], object)], ["class", "name"],
              layer="classes", driver="GPKG", geometry_type="Polygon", crs=crs.to_wkt() if crs else None)  # fmt: skip


def to_wkb(polygon: Mapping[str, Any]) -> bytes:
    """Well-known binary of a GeoJSON polygon (OGC 06-103r4, section 8), little-endian."""
    rings = polygon["coordinates"]
    parts = [struct.pack("<BII", 1, 3, len(rings))]
    parts += [struct.pack("<I", len(ring)) + np.asarray(ring, "<f8").tobytes() for ring in rings]
    return b"".join(parts)


def offset_in(base: Transform, other: Transform, where: str) -> tuple[int, int]:
    """(row, column) of a tile's corner in the pixels of another transform; UserError unless both share one grid."""
    (a, b, c, d, e, f), matrix = base, np.array([[base[0], base[1]], [base[3], base[4]]])
    same = np.allclose([other[i] for i in (0, 1, 3, 4)], (a, b, d, e), rtol=SAME_GRID, atol=0)
    column, row = np.linalg.solve(matrix, [other[2] - c, other[5] - f])
    if not same or max(abs(column - round(column)), abs(row - round(row))) > 0.01:
        raise UserError(f"{where}: lies on another grid of pixels than the scene's first tile. Expected tiles of one "
                        "size of pixels, generated at the size of their masks. Write single tiles instead.")
    return round(row), round(column)


@dataclass(frozen=True)
class PlacedTile:
    """An image file and where it lies.

    Attributes:
        image: path, of any format that ldm.data.images reads.
        size: (height, width) in pixels.
        crs: coordinate system, None if unknown.
        transform: of its pixels.
    """

    image: Path
    size: tuple[int, int]
    crs: str | None
    transform: Transform


def write_mosaic(path: Path, tiles: Sequence[PlacedTile]) -> None:
    """Put tiles of one scene together; where they overlap the first one shows, and where none is there is no data.

    Raises:
        UserError: if the tiles do not share one grid of pixels or one coordinate system.
    """
    rasterio = load_rasterio()
    a, b, c, d, e, f = tiles[0].transform
    if len({tile.crs for tile in tiles}) > 1:
        raise UserError(f"{path.name}: its tiles have several coordinate systems. Expected one a scene. Write single "
                        "tiles instead.")
    corners = [offset_in(tiles[0].transform, tile.transform, str(tile.image)) for tile in tiles]
    top, left = (min(corner[axis] for corner in corners) for axis in (0, 1))
    bottom, right = (max(corner[axis] + tile.size[axis] for corner, tile in zip(corners, tiles, strict=True))
                     for axis in (0, 1))  # fmt: skip
    transform = (a, b, c + a * left + b * top, d, e, f + d * left + e * top)
    with open_geotiff(path, (bottom - top, right - left), 3, tiles[0].crs, transform) as dataset:
        for (row, column), tile in reversed(list(zip(corners, tiles, strict=True))):
            window = rasterio.windows.Window(column - left, row - top, tile.size[1], tile.size[0])
            dataset.write(read_image(tile.image).transpose(2, 0, 1), window=window)
            dataset.write_mask(np.full(tile.size, 255, np.uint8), window=window)
