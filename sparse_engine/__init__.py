"""The updates of TD3 and SAC on connections alone: no dense weight matrix, mask, gradient or moment.

On one CPU, with time and memory in proportion to the connections. ``td3.py`` and ``sac.py`` hold what an agent asks,
``engine.py`` what they share; ``networks.py`` is a stack of networks, its layout, drop and grow, and its state;
``kernels.py`` is all that numba compiles, and ``compilation.py`` how. Nothing here needs the rest of the project:
layers come and go as numpy arrays. Dense layers, all of TD3's own, are matrices that BLAS multiplies: what a dense
agent gains here is what compiling gains.

**What lies where.** A layer's connections are compressed rows (CSR): those into one output lie side by side, each a
weight and the 2-byte number of its input. A second index, by input (CSC), lists the same connections, each with its
output and its place among the weights. All layers of all stacked networks follow one another in the same flat arrays,
biases at the end. Activations are feature-major: one unit's values for the whole batch lie side by side, in whole cache
lines. A target holds a weight for each connection of its network, in the same places, and a few *extras*: connections
that its network has dropped since, and it has not.

**What the compiled updates take.** ``Arrays`` of actor and critics, ``Activations`` of both, a replay buffer's rows
[capacity, columns], int64 indices [batch] of the batch, noise [batch, actions], ``Settings`` and Adam's step number.
All floats have the parameters' type, to which an engine converts noise and a batch's rows. Another type, or another
number of half vectors in the batch, compiles anew.

**How the kernels move memory.** A connection multiplies a whole row of activations, so loading rows bounds the time.

- ``weighted_sum``, forward: some columns of one output's row (a tile) stay in vector registers while all connections
  into that output pass by, each with its input's tile. Then they are stored, bias and ReLU included. Large layers go by
  bands of inputs, whose tiles fit the first-level cache.
- ``backward_row``, backward: the same from one input over the connections by input. An output's gradient row is loaded
  once and used twice: it adds to the input's gradient, and its dot product with the input's values is the weight's
  gradient. The input's gradient then takes the place of its values, whose work is done.
- ``adam_step`` and ``soft_update`` stream through the flat arrays once; drop and grow, rare, sort them with numpy.
- ``prune_target`` sorts nothing: it counts, a stream of comparisons at a time, how many weights lie below a threshold.
"""
