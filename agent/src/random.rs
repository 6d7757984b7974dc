//! The operating system's randomness, for everything that must not be guessed or repeated.

use rand_core::{Rng, UnwrapErr};

/// The generator that `connect-crypto` draws from.
///
/// # Panics
/// When the operating system has no randomness to give: nothing here could go on then.
pub(crate) fn rng() -> UnwrapErr<getrandom::SysRng> {
    UnwrapErr(getrandom::SysRng)
}

/// So many random bytes.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rng().fill_bytes(&mut bytes);
    bytes
}

/// A uniform number.
pub(crate) fn number() -> u32 {
    u32::from_be_bytes(bytes())
}
