//! How records travel on a data socket: base64 text frames, or raw binary frames.

use serde::{Deserialize, Serialize};

use crate::limits::MAX_NOISE_BYTES;

/// The two encodings; the reacher chooses, the prologue fixes the choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Encoding {
    /// One record a text frame: RFC 4648 section 4, standard alphabet, no padding.
    #[default]
    Base64,
    /// One record a binary frame.
    Binary,
}

/// A text frame that is not the base64 of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a base64 packet")]
pub struct BadPacket;

impl Encoding {
    /// The WebSocket subprotocol.
    #[must_use]
    pub fn subprotocol(self) -> &'static str {
        match self {
            Self::Base64 => "connect.v1.base64",
            Self::Binary => "connect.v1.binary",
        }
    }

    /// The encoding that a subprotocol names.
    #[must_use]
    pub fn from_subprotocol(name: &str) -> Option<Self> {
        [Self::Base64, Self::Binary].into_iter().find(|encoding| encoding.subprotocol() == name)
    }

    /// The number of the encoding in the prologue.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Base64 => 1,
            Self::Binary => 2,
        }
    }
}

/// Bytes of the text that a sealed record of `length` bytes becomes.
#[must_use]
pub fn base64_length(length: usize) -> usize {
    (4 * length).div_ceil(3)
}

/// Appends a sealed record as the text of a frame to `out`.
pub fn encode_base64(record: &[u8], out: &mut Vec<u8>) {
    base64_simd::STANDARD_NO_PAD.encode_append(record, out);
}

/// Decodes the text of a frame in place, and returns the sealed record.
///
/// # Errors
/// [`BadPacket`]: padding, another alphabet, non-zero trailing bits, or more than a Noise message.
pub fn decode_base64(text: &mut [u8]) -> Result<&mut [u8], BadPacket> {
    if text.len() > base64_length(MAX_NOISE_BYTES) {
        return Err(BadPacket);
    }
    base64_simd::STANDARD_NO_PAD.decode_inplace(text).map_err(|_| BadPacket)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(text: &[u8]) -> Result<Vec<u8>, BadPacket> {
        decode_base64(&mut text.to_vec()).map(|record| record.to_vec())
    }

    #[test]
    fn only_the_canonical_base64_is_a_packet() {
        assert_eq!(decoded(b"AAEC"), Ok(vec![0, 1, 2]));
        for bad in ["AAE=", "AA==", "AA-_", "A", "AAE\n", "AAF", " AAEC", "AB"] {
            assert_eq!(decoded(bad.as_bytes()), Err(BadPacket), "{bad}");
        }
    }

    #[test]
    fn packets_have_a_limit() {
        let mut text = Vec::new();
        encode_base64(&vec![7; MAX_NOISE_BYTES], &mut text);
        assert_eq!(decoded(&text), Ok(vec![7; MAX_NOISE_BYTES]));
        text.clear();
        encode_base64(&vec![7; MAX_NOISE_BYTES + 1], &mut text);
        assert_eq!(decoded(&text), Err(BadPacket));
    }

    proptest! {
        #[test]
        fn packets_round_trip(raw in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let mut text = b"head".to_vec();
            encode_base64(&raw, &mut text);
            prop_assert_eq!(text.len(), 4 + base64_length(raw.len()));
            prop_assert_eq!(decoded(&text[4..]), Ok(raw));
        }
    }
}
