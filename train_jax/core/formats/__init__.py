"""Layouts of data on disk that several packages read: a data set of TFDS, folders of images by class."""
