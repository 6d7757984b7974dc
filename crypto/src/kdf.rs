//! HMAC-BLAKE2s-256 and the derivation of keys, with every intermediate wiped.

use blake2::{Blake2s256, Digest};
use zeroize::Zeroizing;

/// Block of BLAKE2s in bytes.
pub(crate) const BLOCK_BYTES: usize = 64;
/// Output of BLAKE2s-256 in bytes.
pub(crate) const HASH_BYTES: usize = 32;

const INNER_PAD: u8 = 0x36;
const OUTER_PAD: u8 = 0x5c;

/// `HMAC-BLAKE2s-256(key, parts)` (RFC 2104) for keys of at most one block.
///
/// The `hmac` crate leaves its padded key in memory; a test holds the two against each other.
pub(crate) fn hmac(key: &[u8], parts: &[&[u8]], out: &mut [u8; HASH_BYTES]) {
    assert!(key.len() <= BLOCK_BYTES, "keys of this protocol fit one block");
    let mut block = Zeroizing::new([0; BLOCK_BYTES]);
    block[..key.len()].copy_from_slice(key);

    block.iter_mut().for_each(|byte| *byte ^= INNER_PAD);
    let mut hasher = Blake2s256::new();
    hasher.update(block.as_slice());
    parts.iter().for_each(|part| hasher.update(part));
    hasher.finalize_into(out.into());

    block.iter_mut().for_each(|byte| *byte ^= INNER_PAD ^ OUTER_PAD);
    let mut hasher = Blake2s256::new();
    hasher.update(block.as_slice());
    hasher.update(out.as_slice());
    hasher.finalize_into(out.into());
}

/// `KDF(k, l) = HMAC-BLAKE2s-256(k, "connect/v1 " || l)`.
pub(crate) fn kdf(key: &[u8; 32], label: &[u8]) -> Zeroizing<[u8; HASH_BYTES]> {
    let mut out = Zeroizing::new([0; HASH_BYTES]);
    hmac(key, &[b"connect/v1 ", label], &mut out);
    out
}

#[cfg(test)]
mod tests {
    use hmac::{KeyInit, Mac, SimpleHmac};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn hmac_is_that_of_the_hmac_crate(key in proptest::collection::vec(any::<u8>(), 0..=64), text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut ours = [0; 32];
            hmac(&key, &[&text[..text.len() / 2], &text[text.len() / 2..]], &mut ours);
            let mut theirs = SimpleHmac::<Blake2s256>::new_from_slice(&key).expect("any length");
            theirs.update(&text);
            prop_assert_eq!(ours, <[u8; 32]>::from(theirs.finalize().into_bytes()));
        }
    }
}
