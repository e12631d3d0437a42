#pragma once
// What the launcher in selective_scan.cpp calls: leaf kernels over raw pointers, one table per SIMD level.
//
// Lanes are channels; states are taken in groups of four, of which the last is filled up with states that stay 0. The
// sum over states is that of the groups, in order. A task is a run of segments, channels and groups. It may hold all groups
// (kWhole), or part of them: then each group leaves its sums in a buffer (kPart), and a later task of all groups adds them
// up (kFinish). It may also hold a window of one segment's rows, in chunks: then what moves along the segment is carried
// from window to window in `carried`, dA, dD and dbias, and the gradient finds the states before some chunks in `kept`,
// where a task has left them (kKeep). Either way the bits are the same.
#include <stdint.h>

#include "simd_level.h"

namespace geo {

constexpr int64_t kStateGroup = 4;
constexpr int64_t kScanChunk = 16;  // rows
constexpr int64_t kScanLanes = 16;  // channels are filled up to a multiple of this, the widest vector

struct Scan {
  const int64_t* ptr;
  int64_t T, E, N;
  int64_t groups, width;  // ceil(N / kStateGroup); E filled up
  bool softplus, reverse, zoh;

  // Rows of the storage type: inputs (z may be null) and results.
  const void *u, *delta, *B, *C, *z, *grad_y;
  void *y, *du, *ddelta, *dz;

  // In the accumulation type. [kStateGroup * groups, width]: A log2(e) and 1 / A, transposed.
  const void *rate, *inverse;
  const void *D, *bias;  // [width]: 0 where there is none
  const void *initial, *grad_last;  // [S, E, N] or null
  void *last, *dinitial;            // or null

  // Parts of sums, in the accumulation type: by blocks of channels, [blocks, rows, kStateGroup * groups]; by tiles,
  // [tiles, kStateGroup * groups, width] and [tiles, width], which start at 0; by groups, [kinds, groups, rows, width].
  void *dB, *dC, *dA, *dD, *dbias, *parts;
  int64_t first_row, rows;  // of dB, dC and parts

  // Of a segment in windows, or null: the state (or its gradient) between them, [kStateGroup * groups, width], and the
  // states before every `piece` chunks, [pieces, kStateGroup * groups, width].
  void *carried, *kept;
  int64_t piece;
};

enum class ScanMode { kWhole, kPart, kFinish, kKeep };

struct ScanTask {
  ScanMode mode;
  int64_t tile, first_segment, last_segment;
  int64_t block, first_channel, last_channel;
  int64_t first_group, last_group;
  int64_t first_chunk, last_chunk;  // of each segment, as far as it goes
};

struct SelectiveScanTable {
  int64_t lanes;
  int64_t (*scratch)(const Scan&, const ScanTask&, bool backward);  // how many numbers of the accumulation type
  void (*forward)(const Scan&, const ScanTask&, void* scratch);     // scratch: aligned to 64 bytes
  void (*backward)(const Scan&, const ScanTask&, void* scratch);
};

GEO_DECLARE_TABLE(SelectiveScanTable, selective_scan_float)
GEO_DECLARE_TABLE(SelectiveScanTable, selective_scan_double)
GEO_DECLARE_TABLE(SelectiveScanTable, selective_scan_bfloat16)
GEO_DECLARE_TABLE(SelectiveScanTable, selective_scan_float16)

}  // namespace geo
