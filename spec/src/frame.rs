//! Heads and masks of the WebSocket frames of a data socket (RFC 6455 section 5).
//!
//! Both programs handle data frames themselves: the hub forwards them without looking inside, and an
//! agent writes and reads them where the records are. Control sockets leave all of this to a library.

use crate::limits::MAX_DATA_FRAME_BYTES;

/// The first bit of a frame: it ends its message.
const FIN: u8 = 0x80;
/// Bits of extensions, of which none is negotiated.
const RESERVED: u8 = 0x70;
/// The bit that says that a mask follows the length.
const MASKED: u8 = 0x80;

/// Longest head: two bytes, eight of length, four of mask.
pub const MAX_HEAD_BYTES: usize = 14;
/// Longest payload of a control frame (RFC 6455 section 5.5).
pub const MAX_CONTROL_BYTES: usize = 125;

/// What a frame is (RFC 6455 section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of RFC 6455")]
pub enum Opcode {
    Continuation,
    Text,
    Binary,
    Close,
    Ping,
    Pong,
}

impl Opcode {
    fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0x0 => Self::Continuation,
            0x1 => Self::Text,
            0x2 => Self::Binary,
            0x8 => Self::Close,
            0x9 => Self::Ping,
            0xa => Self::Pong,
            _ => return None,
        })
    }

    fn number(self) -> u8 {
        match self {
            Self::Continuation => 0x0,
            Self::Text => 0x1,
            Self::Binary => 0x2,
            Self::Close => 0x8,
            Self::Ping => 0x9,
            Self::Pong => 0xa,
        }
    }

    /// Whether a frame of this kind may come between the frames of a message.
    #[must_use]
    pub fn is_control(self) -> bool {
        matches!(self, Self::Close | Self::Ping | Self::Pong)
    }
}

/// Who wrote a frame: clients mask theirs, servers do not (RFC 6455 section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sender {
    /// An agent.
    Client,
    /// The hub.
    Server,
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Whether the frame ends its message.
    pub fin: bool,
    /// What it is.
    pub opcode: Opcode,
    /// Length of the payload.
    pub length: usize,
    /// What the payload is masked with; from clients always, from servers never.
    pub mask: Option<[u8; 4]>,
}

/// A frame that breaks the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Reserved bits, an unknown opcode, a mask where none may be or the other way round, a length
    /// that is not in its shortest form, a control frame in parts or too long.
    #[error("a frame breaks RFC 6455")]
    Protocol,
    /// Longer than any record.
    #[error("a frame is longer than {MAX_DATA_FRAME_BYTES} bytes")]
    TooLong,
}

/// What the first bytes of a frame say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// The head is longer by at least so many bytes.
    Missing(usize),
    /// The head, and how long it is.
    Head(Head, usize),
}

impl Head {
    /// Reads the head that `bytes` begins with.
    ///
    /// # Errors
    /// [`FrameError`], as early as the bytes tell.
    pub fn parse(bytes: &[u8], sender: Sender) -> Result<Parsed, FrameError> {
        let &[first, second, ..] = bytes else {
            return Ok(Parsed::Missing(2 - bytes.len()));
        };
        let masked = second & MASKED != 0;
        if first & RESERVED != 0 || masked != (sender == Sender::Client) {
            return Err(FrameError::Protocol);
        }
        let fin = first & FIN != 0;
        let opcode = Opcode::from_number(first & 0x0f).ok_or(FrameError::Protocol)?;
        let short = usize::from(second & !MASKED);
        if opcode.is_control() && (!fin || short > MAX_CONTROL_BYTES) {
            return Err(FrameError::Protocol);
        }
        let length_bytes = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let whole = 2 + length_bytes + if masked { 4 } else { 0 };
        if bytes.len() < whole {
            return Ok(Parsed::Missing(whole - bytes.len()));
        }
        let (spelled, rest) = bytes[2..].split_at(length_bytes);
        let long = spelled.iter().fold(0_u64, |length, byte| length << 8 | u64::from(*byte));
        let (length, least) = match length_bytes {
            0 => (short as u64, 0),
            2 => (long, 126),
            _ => (long, 0x1_0000),
        };
        if length < least {
            return Err(FrameError::Protocol);
        }
        let length = usize::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_DATA_FRAME_BYTES)
            .ok_or(FrameError::TooLong)?;
        let mask = rest.first_chunk().copied().filter(|_| masked);
        Ok(Parsed::Head(Self { fin, opcode, length, mask }, whole))
    }

    /// Writes the head to the beginning of `out`; returns how long it is.
    ///
    /// # Panics
    /// When `out` is shorter than the head; [`MAX_HEAD_BYTES`] are always enough.
    #[expect(clippy::cast_possible_truncation, reason = "each arm bounds the value")]
    pub fn write(&self, out: &mut [u8]) -> usize {
        let masked = if self.mask.is_some() { MASKED } else { 0 };
        out[0] = self.opcode.number() | if self.fin { FIN } else { 0 };
        let mut end = match self.length {
            0..=125 => {
                out[1] = masked | self.length as u8;
                2
            }
            126..=0xffff => {
                out[1] = masked | 126;
                out[2..4].copy_from_slice(&(self.length as u16).to_be_bytes());
                4
            }
            _ => {
                out[1] = masked | 127;
                out[2..10].copy_from_slice(&(self.length as u64).to_be_bytes());
                10
            }
        };
        if let Some(mask) = self.mask {
            out[end..end + 4].copy_from_slice(&mask);
            end += 4;
        }
        end
    }
}

/// Masks or unmasks in place: `bytes[i] ^= mask[i % 4]`.
pub fn mask(bytes: &mut [u8], mask: [u8; 4]) {
    // Eight bytes at a time, so that the compiler can use wide registers.
    let wide = widened(mask);
    let (words, tail) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in tail.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// As [`mask`], from `input` to `output`, which are equally long.
pub fn mask_to(input: &[u8], output: &mut [u8], mask: [u8; 4]) {
    let wide = widened(mask);
    let (words, tail) = input.as_chunks::<8>();
    let (words_out, tail_out) = output.as_chunks_mut::<8>();
    for (out, word) in words_out.iter_mut().zip(words) {
        *out = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for ((out, byte), mask) in tail_out.iter_mut().zip(tail).zip(mask.iter().cycle()) {
        *out = byte ^ mask;
    }
}

fn widened([a, b, c, d]: [u8; 4]) -> u64 {
    u64::from_ne_bytes([a, b, c, d, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads_have_these_bytes() {
        let check = |length, mask, expected: &[u8]| {
            let head = Head { fin: true, opcode: Opcode::Binary, length, mask };
            let mut out = [0; MAX_HEAD_BYTES];
            let end = head.write(&mut out);
            assert_eq!(&out[..end], expected);
            let sender = if mask.is_some() { Sender::Client } else { Sender::Server };
            assert_eq!(Head::parse(expected, sender), Ok(Parsed::Head(head, end)));
            for cut in 2..end {
                let parsed = Head::parse(&expected[..cut], sender);
                assert_eq!(parsed, Ok(Parsed::Missing(end - cut)));
            }
        };
        check(125, None, &[0x82, 125]);
        check(126, None, &[0x82, 126, 0, 126]);
        check(65_535, None, &[0x82, 126, 0xff, 0xff]);
        check(65_536, None, &[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
        check(0, Some([1, 2, 3, 4]), &[0x82, 0x80, 1, 2, 3, 4]);
        check(300, Some([1, 2, 3, 4]), &[0x82, 0xfe, 1, 44, 1, 2, 3, 4]);
        assert_eq!(Head::parse(&[], Sender::Server), Ok(Parsed::Missing(2)));
    }

    #[test]
    fn frames_that_break_the_rules_are_refused() {
        let over = (MAX_DATA_FRAME_BYTES as u64 + 1).to_be_bytes();
        let too_long = [&[0x82, 127][..], &over].concat();
        for (bytes, error) in [
            (&[0xc2, 0][..], FrameError::Protocol),       // a reserved bit
            (&[0x83, 0], FrameError::Protocol),           // an opcode that is none
            (&[0x82, 0x80], FrameError::Protocol),        // a mask from the hub
            (&[0x09, 0], FrameError::Protocol),           // a ping in parts
            (&[0x89, 126, 0, 126], FrameError::Protocol), // a long ping
            (&[0x82, 126, 0, 125], FrameError::Protocol), // two bytes where one does
            (&[0x82, 127, 0, 0, 0, 0, 0, 0, 0xff, 0xff], FrameError::Protocol),
            (&too_long, FrameError::TooLong),
            (&[0x82, 127, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], FrameError::TooLong),
        ] {
            assert_eq!(Head::parse(bytes, Sender::Server), Err(error), "{bytes:02x?}");
        }
        assert_eq!(Head::parse(&[0x82, 0], Sender::Client), Err(FrameError::Protocol));
    }

    proptest! {
        #[test]
        fn masking_is_byte_by_byte(
            bytes in proptest::collection::vec(any::<u8>(), 0..70),
            key in any::<[u8; 4]>(),
        ) {
            let expected: Vec<u8> =
                bytes.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
            let (mut in_place, mut out) = (bytes.clone(), vec![0; bytes.len()]);
            mask(&mut in_place, key);
            mask_to(&bytes, &mut out, key);
            prop_assert_eq!(&in_place, &expected);
            prop_assert_eq!(&out, &expected);
        }
    }
}
