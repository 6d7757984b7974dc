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

/// Encodes a sealed record for a text frame.
#[must_use]
pub fn encode_base64(record: &[u8]) -> String {
    base64_simd::STANDARD_NO_PAD.encode_to_string(record)
}

/// Decodes a text frame into `record`, replacing what was there.
///
/// # Errors
/// [`BadPacket`]: padding, another alphabet, non-zero trailing bits, or more than a Noise message.
pub fn decode_base64(text: &[u8], record: &mut Vec<u8>) -> Result<(), BadPacket> {
    record.clear();
    if text.len() > MAX_NOISE_BYTES.div_ceil(3) * 4 {
        return Err(BadPacket);
    }
    record.resize(text.len() / 4 * 3 + 3, 0);
    let length = base64_simd::STANDARD_NO_PAD
        .decode(text, base64_simd::Out::from_slice(record))
        .map_err(|_| BadPacket)?
        .len();
    record.truncate(length);
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_canonical_base64_is_a_packet() {
        let mut record = Vec::new();
        assert_eq!(decode_base64(b"AAEC", &mut record), Ok(()));
        assert_eq!(record, [0, 1, 2]);
        for bad in ["AAE=", "AA==", "AA-_", "A", "AAE\n", "AAF", " AAEC", "AB"] {
            assert_eq!(decode_base64(bad.as_bytes(), &mut record), Err(BadPacket), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn packets_round_trip(raw in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let mut record = vec![1, 2, 3];
            prop_assert_eq!(decode_base64(encode_base64(&raw).as_bytes(), &mut record), Ok(()));
            prop_assert_eq!(record, raw);
        }
    }
}
