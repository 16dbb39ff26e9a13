"""The deploy graph: the trained network rewritten for inference, exactly.

It takes letterboxed RGB as uint8, (B, H, W, 3). It gives saliency (B, Q), score (B, Q), masks as
logits, (B, Q, H/4, W/4), and attention (B, H/8, W/8) where the network has it. Only the output of
the last decoder layer is computed. Every rewrite is exact algebra, and a test compares it with the
part of `dsgnn.model` that it replaces:

- Attention over a single key does not depend on the query. Both such attentions of the graph
  encoder fold into one C×C map of the global vector, and the first edges are one row for each
  image.
- The maps A, B, U and V of a graph layer are one product. The common encoder runs once for both
  branches.
- Cross-attention has few queries and many keys. W_k is absorbed into the queries, and W_v is
  applied after pooling, so that there is no tensor of keys or values. The bias of the keys and the
  vector of the level cancel in the softmax; on the side of the values they are a constant. Both
  branches share the two large products.
- Resizing and the sum over channels may change places. Attention masks are therefore made of pixel
  features that are resized once for each level, and the last 1×1 convolution of the pixel embedding
  moves into the mask embedding.
- In deformable attention, the position, the cell's centre and the scale fold into the projection
  that says where to sample.
- The BatchNorms of the pyramid fold into its convolutions.
- What Swin masks in its windows gets the weight 0 instead of e^-100. That number is subnormal in
  float32, and took 40% of the time of Swin-L in ONNX Runtime on a CPU.

Cells are the last axis everywhere, so that nothing is transposed between products.

B is the batch, Q the number of queries, C the width, M the number of heads, D = C / M, K the number
of cells of one level, and N that of all levels.
"""
