//! Bytes that were read and are not written yet. While they wait they take little more memory than they are long: a
//! slice of a tunnel keeps all of the buffer that it was read into, and its peer chooses how small a part of that it
//! is.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes, BytesMut};

use super::FRAME;

/// Number of pieces that are written to a socket at once.
pub const SLICES: usize = 32;
/// A waiting piece smaller than this, in bytes, is copied to the one before it: each costs memory besides its bytes,
/// and the peer chooses how many there are.
const PIECE: usize = 4 << 10;
/// Bytes that are copied together at most; one more small piece may exceed it.
const TOGETHER: usize = 64 << 10;
/// A waiting slice of a tunnel smaller than this, in bytes, is copied: the buffer that it was read into has room for
/// the largest frame.
const PART: usize = FRAME as usize / 4;

/// Slices in the order in which they were read.
#[derive(Debug, Default)]
pub struct Batch {
    slices: VecDeque<Bytes>,
    /// Number of slices, from the first on, that need no copy to wait.
    kept: usize,
    /// Small pieces that were copied together; they come after the slices.
    small: BytesMut,
}

impl Batch {
    /// Returns true if nothing waits.
    pub fn is_empty(&self) -> bool {
        self.slices.is_empty() && self.small.is_empty()
    }

    /// Adds bytes that were read from a tunnel.
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

    /// Adds bytes that hold no memory besides their own to the empty batch.
    pub fn put(&mut self, own: Bytes) {
        self.slices.push_back(own);
        self.kept = self.slices.len();
    }

    /// Prepares the content for waiting: copies small slices out of their buffers.
    pub fn keep(&mut self) {
        for slice in self.slices.iter_mut().skip(self.kept) {
            if slice.len() < PART {
                *slice = Bytes::copy_from_slice(slice);
            }
        }
        self.kept = self.slices.len();
    }

    /// Takes the first piece.
    pub fn pop(&mut self) -> Option<Bytes> {
        if self.slices.is_empty() {
            self.take_small();
        }
        self.kept = self.kept.saturating_sub(1);
        self.slices.pop_front()
    }

    /// Fills `to` with the first pieces and returns how many there are.
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

    /// Removes bytes that were written.
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
