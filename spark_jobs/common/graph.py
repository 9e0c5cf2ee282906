"""Groups of notes in a graph: connected components, near-duplicates, clusters of strongest neighbours."""

from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from scipy import sparse

_FEW_EDGES = 1_000_000  # so many are collected: each round of Spark takes seconds, however small the graph


def components(edges: DataFrame) -> DataFrame:
    """Undirected edges (a, b) of strings -> (node, component): a component is named by its smallest node."""
    ends = edges.select("a", "b").persist()  # of a large graph, what the first look computes is not computed again
    try:
        few = ends.limit(_FEW_EDGES + 1).toArrow()
        if few.num_rows > _FEW_EDGES:
            return _spread_components(ends)
    finally:
        ends.unpersist()
    # With a schema, because Spark Connect infers none from an empty table.
    return edges.sparkSession.createDataFrame(_local_components(few), "node string, component string")


def _local_components(ends: pa.Table) -> pa.Table:
    nodes = pa.chunked_array([*ends["a"].chunks, *ends["b"].chunks], pa.string())
    names = pc.unique(nodes).sort()
    a, b = np.split(pc.index_in(nodes, names).to_numpy(), 2)
    graph = sparse.coo_array((np.ones(len(a), np.int8), (a, b)), shape=(len(names), len(names)))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)
    return pa.table({"node": names, "component": names.take(first[labels])})


def _spread_components(edges: DataFrame) -> DataFrame:
    """Each round gives a node the smallest label among its neighbours, then that label's own label (pointer jumping),
    so a chain needs about log2(length) rounds. The loop ends when no label changes.
    """
    ends = edges.select("a", "b").union(edges.select("b", "a"))
    ends = checkpointed(ends.union(ends.select("a", F.col("a").alias("b"))).distinct())  # a node is its own neighbour
    labels = ends.select(F.col("a").alias("node"), F.col("a").alias("component")).distinct()
    while True:
        before = F.max(F.when(F.col("a") == F.col("b"), F.col("component"))).alias("before")
        hop = ends.join(labels, F.col("b") == F.col("node")).groupBy("a").agg(F.min("component").alias("hop"), before)
        jump = hop.select(F.col("a").alias("via"), F.col("hop").alias("component"))
        moved = hop.join(jump, F.col("hop") == F.col("via")).select(F.col("a").alias("node"), "before", "component")
        moved = checkpointed(moved)
        labels = moved.select("node", "component")
        if not moved.filter(F.col("before") != F.col("component")).head(1):
            return labels


def checkpointed(df: DataFrame) -> DataFrame:
    """`df` with its rows computed and its lineage cut, for use in loops.

    A checkpoint alone keeps the estimated size, and estimates multiply with every join. After some rounds Spark spends
    minutes on numbers of millions of digits. A checkpoint of the cached table has the measured size instead.
    """
    cached = df.persist()
    cached.count()
    fresh = cached.select("*").localCheckpoint()
    cached.unpersist()
    return fresh


def near_duplicates(notes: DataFrame, images: DataFrame | None = None) -> DataFrame:
    """NOTES -> (note_id, group_id): notes with the same text or the same image share a group, transitively.

    Texts (title, topics and content) are compared lower-cased, with white space collapsed; an empty text equals no
    other. Images are compared by their bytes and their perceptual hash in `images` (NOTE_IMAGES); without `images`, by
    their path and their bytes. A group is named by its smallest note id.
    """
    text = F.concat_ws(" ", "title", F.array_join("topics", " "), "content")
    words = F.btrim(F.regexp_replace(F.lower(text), r"\s+", " "))
    keys: list[tuple[DataFrame, Column]] = [
        (notes, F.when(words != "", F.sha2(words, 256))),
    ]
    if images is not None:  # many notes may share the path of a placeholder: only usable images have an image_id
        keys += [(images, F.col("image_id")), (images, F.col("perceptual_hash"))]
    else:
        keys += [(notes, F.col("image_path")), (notes, F.sha2("image", 256))]
    tables = [
        df.select("note_id", key.alias("key"), F.lit(i).alias("kind")).filter("key IS NOT NULL")
        for i, (df, key) in enumerate(keys)
    ]
    shared = reduce(DataFrame.union, tables)
    first = F.min("note_id").over(Window.partitionBy("kind", "key"))
    edges = shared.select(F.col("note_id").alias("a"), first.alias("b")).filter("a != b")
    grouped = components(edges).select(F.col("node").alias("note_id"), F.col("component").alias("group_id"))
    group = F.coalesce("group_id", "note_id")
    return notes.select("note_id").join(grouped, "note_id", "left").select("note_id", group.alias("group_id"))


def clusters(edges: DataFrame) -> DataFrame:
    """Weighted edges (a, b, score) -> (node, cluster): every node joins its strongest neighbour.

    The first step of first-neighbour clustering (https://arxiv.org/abs/1902.11266). The strongest neighbour has the
    most edges to the node, then the highest score, then the smallest id. Clusters stay small in a connected graph.
    """
    both = edges.select("a", "b", "score").union(edges.select("b", "a", "score"))
    links = both.groupBy("a", "b").agg(F.count("*").alias("links"), F.max("score").alias("score"))
    order = Window.partitionBy("a").orderBy(F.desc("links"), F.desc("score"), F.asc("b"))
    strongest = links.withColumn("rank", F.row_number().over(order)).filter("rank = 1")
    return components(strongest).withColumnRenamed("component", "cluster")


def hash_position(name: Column, salt: str) -> Column:
    """A hash of `name` in [0, 1): the first 52 bits of the SHA-256 of `salt` and `name`."""
    digits = F.substring(F.sha2(F.concat(F.lit(salt), name), 256), 1, 13)
    return F.conv(digits, 16, 10).cast("double") / float(1 << 52)
