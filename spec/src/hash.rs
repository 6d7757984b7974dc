//! The one hash of the protocol, with its domain separation.

use blake2::{Blake2s256, Digest};

/// Length of a hash in bytes.
pub const HASH_BYTES: usize = 32;

/// `H(l, x) = BLAKE2s-256("connect/v1 " || l || 0x00 || x)` (RFC 7693), over `x` given in parts.
///
/// PROTOCOL.md, "Hashes and derivations". Labels are constants of this crate and of `connect-crypto`;
/// none contains a zero byte, so no two inputs of different labels collide.
#[must_use]
pub fn hash(label: &str, parts: &[&[u8]]) -> [u8; HASH_BYTES] {
    let mut hasher = Blake2s256::new();
    hasher.update(b"connect/v1 ");
    hasher.update(label.as_bytes());
    hasher.update([0]);
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// The first 16 bytes of [`hash`]: what ids are made of.
#[must_use]
pub fn hash16(label: &str, parts: &[&[u8]]) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&hash(label, parts)[..16]);
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_hashed_as_one_string() {
        assert_eq!(hash("l", &[b"ab", b"c"]), hash("l", &[b"abc"]));
    }

    #[test]
    fn label_separates_domains() {
        assert_ne!(hash("a", &[b"x"]), hash("b", &[b"x"]));
        assert_ne!(hash("ab", &[b"x"]), hash("a", &[b"bx"]));
    }
}
