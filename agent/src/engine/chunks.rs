//! Bytes of a stream in the pieces in which they came.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

/// Pieces below this size are copied together: a piece keeps the whole buffer alive that it was cut
/// from, and a peer that sends single bytes must not make a buffer wait for each.
const COPIED: usize = 16 * 1024;

/// A queue of bytes. Large pieces are kept as they are, without a copy.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    pieces: VecDeque<Bytes>,
    /// What follows the pieces: small ones, copied together.
    tail: BytesMut,
    length: usize,
}

impl Chunks {
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Appends the next `length` bytes of `bytes`.
    pub(super) fn push(&mut self, mut bytes: impl Buf, length: usize) {
        self.length += length;
        if length < COPIED {
            self.tail.extend_from_slice(&bytes.copy_to_bytes(length));
        } else {
            self.end_tail();
            self.pieces.push_back(bytes.copy_to_bytes(length));
        }
        if self.tail.len() >= COPIED {
            self.end_tail();
        }
    }

    fn end_tail(&mut self) {
        if !self.tail.is_empty() {
            self.pieces.push_back(std::mem::take(&mut self.tail).freeze());
        }
    }

    /// Takes the next bytes, at most `most` of them and at least one if there are any.
    pub(super) fn pop(&mut self, most: usize) -> Bytes {
        if self.pieces.is_empty() {
            self.end_tail();
        }
        let Some(front) = self.pieces.front_mut() else {
            return Bytes::new();
        };
        let taken = if front.len() <= most {
            self.pieces.pop_front().unwrap_or_default()
        } else {
            front.split_to(most)
        };
        self.length -= taken.len();
        self.give_back();
        taken
    }

    /// Drops the first `count` bytes.
    ///
    /// # Panics
    /// When there are fewer.
    pub(super) fn advance(&mut self, mut count: usize) {
        assert!(count <= self.length, "no more than is there");
        self.length -= count;
        while let Some(front) = self.pieces.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.pieces.pop_front();
        }
        self.tail.advance(count);
        self.give_back();
    }

    /// Appends `length` bytes, from the `start`th on, to `out`.
    ///
    /// # Panics
    /// When there are fewer.
    pub(super) fn copy_to(&self, mut start: usize, mut length: usize, out: &mut Vec<u8>) {
        for piece in self.pieces.iter().map(Bytes::as_ref).chain([self.tail.as_ref()]) {
            if length == 0 {
                return;
            }
            if let Some(from) = piece.get(start..) {
                let from = &from[..from.len().min(length)];
                out.extend_from_slice(from);
                length -= from.len();
            }
            start = start.saturating_sub(piece.len());
        }
        assert_eq!(length, 0, "no more than is there");
    }

    /// Frees what an empty queue holds: idle streams hold nothing.
    fn give_back(&mut self) {
        if self.length == 0 {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn large_pieces_are_not_copied_and_small_ones_are() {
        let mut chunks = Chunks::default();
        let large = Bytes::from(vec![1; COPIED]);
        let memory = large.as_ptr();
        chunks.push(large, COPIED);
        for _ in 0..2 * COPIED {
            chunks.push(&[2_u8][..], 1);
        }
        assert_eq!(chunks.pieces.len(), 3);
        assert_eq!(chunks.pop(usize::MAX).as_ptr(), memory);
        assert_eq!(chunks.pop(usize::MAX).len(), COPIED);
    }

    proptest! {
        /// Against a plain queue of bytes.
        #[test]
        fn bytes_come_out_as_they_went_in(
            steps in proptest::collection::vec((0_u8..4, 0_usize..3 * COPIED, 0_usize..9000), 0..60),
        ) {
            let (mut chunks, mut model) = (Chunks::default(), VecDeque::new());
            let mut next = 0_u8;
            for (step, size, start) in steps {
                match step {
                    0 => {
                        let bytes: Vec<u8> = (0..size).map(|_| { next = next.wrapping_add(1); next }).collect();
                        model.extend(&bytes);
                        chunks.push(Bytes::from(bytes), size);
                    }
                    1 => {
                        let taken = chunks.pop(size);
                        prop_assert!(taken.len() <= size);
                        prop_assert_eq!(taken.is_empty(), model.is_empty() || size == 0);
                        let expected: Vec<u8> = model.drain(..taken.len()).collect();
                        prop_assert_eq!(&taken[..], &expected);
                    }
                    2 => {
                        let count = size.min(model.len());
                        model.drain(..count);
                        chunks.advance(count);
                    }
                    _ => {
                        let start = start.min(model.len());
                        let length = size.min(model.len() - start);
                        let mut out = vec![7];
                        chunks.copy_to(start, length, &mut out);
                        let expected: Vec<u8> = model.range(start..start + length).copied().collect();
                        prop_assert_eq!(&out[1..], &expected);
                    }
                }
                prop_assert_eq!(chunks.len(), model.len());

            }
        }
    }
}
