// Positions of tokens and patches, and windows of patches, as layout.py of the Python runner: "Qwen2-VL", section 2.1
// (arXiv 2409.12191), and "Qwen2.5-VL", section 2.1 (arXiv 2502.13923). A grid is [rows, columns] of patches.

// Frame, row and column of every token: three arrays. visual: boolean per token; merge: a token covers merge x merge
// patches.
export function picturePositions(visual, grids, merge) {
  const axes = [[], [], []];
  let start = 0;
  let picture = 0;
  for (let at = 0; at < visual.length;) {
    let end = at;
    while (end < visual.length && visual[end] === visual[at]) end++;
    if (visual[at]) {
      const [rows, columns] = grids[picture++].map((side) => side / merge);
      for (let row = 0; row < rows; row++) {
        for (let column = 0; column < columns; column++) {
          [0, row, column].forEach((place, axis) => axes[axis].push(start + place));
        }
      }
      start += Math.max(rows, columns);
    } else {
      for (let text = at; text < end; text++) axes.forEach((axis) => axis.push(start + text - at));
      start += end - at;
    }
    at = end;
  }
  return axes;
}

// What a tower over packed patches needs to know about one picture: name -> [numbers, sizes].
export function patchLayout([rows, columns], config) {
  const merge = config.spatial_merge_size ?? 1;
  const patches = rows * columns;
  const layout = {
    grid_thw: [
      [1, rows, columns],
      [1, 3],
    ],
    cu_seqlens: [[0, patches], [2]],
    position_ids: [patchPositions(rows, columns, merge), [patches, 2]],
  };
  if (config.window_size != null) {
    const side = Math.floor(Math.floor(config.window_size / merge) / config.patch_size);
    const { order, ends } = windows(rows / merge, columns / merge, side, merge);
    layout.window_index = [order, [order.length]];
    layout.cu_window_seqlens = [ends, [ends.length]];
  }
  return layout;
}

// Row and column of every patch; patches come in blocks of merge x merge, as they are merged later.
function patchPositions(rows, columns, merge) {
  const found = [];
  for (let top = 0; top < rows; top += merge) {
    for (let left = 0; left < columns; left += merge) {
      for (let row = top; row < top + merge; row++) {
        for (let column = left; column < left + merge; column++) found.push(row, column);
      }
    }
  }
  return found;
}

// The order that puts the tokens of one window of side x side together, and where windows end, in patches.
function windows(rows, columns, side, merge) {
  const order = [];
  const ends = [0];
  for (let top = 0; top < rows; top += side) {
    for (let left = 0; left < columns; left += side) {
      for (let row = top; row < Math.min(top + side, rows); row++) {
        for (let column = left; column < Math.min(left + side, columns); column++) order.push(row * columns + column);
      }
      ends.push(order.length * merge * merge);
    }
  }
  return { order, ends };
}
