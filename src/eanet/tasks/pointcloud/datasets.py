"""Data sets of clouds: ModelNet40 and ShapeNetPart in both their formats, and any folder of files.

Numbers of classes, categories and parts are taken from the data, never from constants, so that any
data set in one of these layouts is read. Each layout has a module of its own; all of them offer
splits of :class:`CloudArrays` or :class:`CloudFiles`.
"""

from eanet.tasks.pointcloud.clouds import CloudArrays, CloudFiles, labels_of
from eanet.tasks.pointcloud.modelnet import ModelNet
from eanet.tasks.pointcloud.point_folder import PointFolder
from eanet.tasks.pointcloud.shapenet_part import ShapeNetPart

__all__ = ["CloudArrays", "CloudFiles", "ModelNet", "PointFolder", "ShapeNetPart", "labels_of"]
