//! What was read and is not written yet. What has to wait takes little more memory than its bytes: a
//! slice of a tunnel keeps all of the buffer that it was read into, and its peer chooses how small a
//! part of that it is.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use super::FRAME;

/// Pieces that are written to a socket at once.
pub const SLICES: usize = 32;
/// A piece smaller than this is copied to the one before it when it has to wait: each costs memory
/// besides its bytes, and the peer chooses how many there are.
const PIECE: usize = 4 << 10;
/// Up to how much is copied together.
const TOGETHER: usize = 64 << 10;
/// A slice of a tunnel that has to wait is copied if it is smaller than this. What it was read into has
/// room for the largest frame.
const PART: usize = FRAME as usize / 4;

/// Slices in their order.
#[derive(Debug, Default)]
pub struct Batch {
    slices: VecDeque<Bytes>,
    /// So many of the slices, from the first on, may wait as they are.
    kept: usize,
    /// Comes after the slices.
    small: BytesMut,
}

impl Batch {
    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty() && self.small.is_empty()
    }

    /// Adds what was read of a tunnel.
    pub fn push(&mut self, slice: Bytes) {
        if self.slices.len() < SLICES && self.small.is_empty() {
            self.slices.push_back(slice);
        } else if slice.len() < PIECE && self.small.len() < TOGETHER {
            self.small.extend_from_slice(&slice);
        } else {
            self.take_small();
            self.slices.push_back(slice);
        }
    }

    /// Adds to the empty batch what has no memory besides its own.
    pub fn put(&mut self, own: Bytes) {
        self.slices.push_back(own);
        self.kept = self.slices.len();
    }

    /// What is in it has to wait.
    pub fn keep(&mut self) {
        for slice in self.slices.iter_mut().skip(self.kept) {
            if slice.len() < PART {
                *slice = Bytes::copy_from_slice(slice);
            }
        }
        self.kept = self.slices.len();
    }

    /// The first piece.
    pub fn pop(&mut self) -> Option<Bytes> {
        if self.slices.is_empty() {
            self.take_small();
        }
        self.kept = self.kept.saturating_sub(1);
        self.slices.pop_front()
    }

    /// Shows the first pieces; how many.
    pub fn show<'a>(&'a mut self, to: &mut [IoSlice<'a>; SLICES]) -> usize {
        if self.slices.is_empty() {
            self.take_small();
        }
        let mut count = 0;
        for (slot, slice) in to.iter_mut().zip(&self.slices) {
            *slot = IoSlice::new(slice);
            count += 1;
        }
        count
    }

    /// So much was written of what was shown.
    pub fn advance(&mut self, mut written: usize) {
        while let Some(first) = self.slices.front_mut() {
            if written < first.len() {
                first.advance(written);
                return;
            }
            written -= first.len();
            self.pop();
        }
    }

    fn take_small(&mut self) {
        if !self.small.is_empty() {
            self.slices
                .push_back(std::mem::take(&mut self.small).freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_to_wait_keeps_no_buffer_that_it_is_a_small_part_of() {
        let read = Bytes::from((0..FRAME).map(|at| at as u8).collect::<Vec<_>>());
        for length in [1, PIECE, PART - 1] {
            let mut batch = Batch::default();
            for at in 0..2 * SLICES {
                batch.push(read.slice(at..at + length));
            }
            batch.keep();
            assert!(read.is_unique(), "pieces of {length}");
            let mut all = Vec::new();
            while let Some(piece) = batch.pop() {
                all.extend_from_slice(&piece);
            }
            let pushed = (0..2 * SLICES).flat_map(|at| &read[at..at + length]);
            assert!(all.iter().eq(pushed), "pieces of {length}");
        }
    }
}
