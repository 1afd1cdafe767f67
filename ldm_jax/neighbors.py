"""The nearest neighbours of embeddings in a file of them, for `python -m ldm_jax.sample --neighbors`.

python -m ldm_jax.neighbors --database FILE.npy --queries FILE.npy|PICTURE... --count N --output neighbors.npy
"""

from ldm_jax import cli
from ldm_jax.config import UserError
from ldm_jax.paths import resolve


def parser() -> cli.Parser:
    p = cli.Parser(description="Finds the nearest neighbours of embeddings, by cosine similarity, exactly.")
    p.add_argument("--database", required=True, help="embeddings to search: .npy [N,D], or .npz with `embeddings`")
    p.add_argument("--queries", required=True, nargs="+", help="embeddings, .npy or .npz; or pictures, embedded by their mean colours")
    p.add_argument("--count", type=int, required=True, help="neighbours of each query")
    p.add_argument("--output", required=True, help=".npy for the neighbours' embeddings, float32 [queries,count,D]")
    return p


def main() -> int:
    args = parser().parse_args()
    cli.start()
    import numpy as np

    from ldm_jax.data.embeddings import mean_colors, read_embeddings
    from ldm_jax.data.given import read_picture
    from ldm_jax.data.kept import write_array
    from ldm_jax.data.transforms import center_crop
    from ldm_jax.nearest import nearest

    output = resolve(args.output)
    database = read_embeddings(args.database)
    if len(args.queries) == 1 and args.queries[0].endswith((".npy", ".npz")):
        queries = read_embeddings(args.queries[0])
    else:
        pictures = [read_picture(file) for file in args.queries]
        queries = np.stack([mean_colors(center_crop(picture, min(picture.shape[:2]))) for picture in pictures])
    try:
        found = np.asarray(database)[nearest(queries, database, args.count)].astype(np.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
    write_array(output, found)
    print(f"{found.shape[0]} x {found.shape[1]} neighbours: {args.output}")
    return cli.OK


if __name__ == "__main__":
    cli.guarded(main)
