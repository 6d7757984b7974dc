//! Fixed-size secrets that wipe themselves and never print.

use rand_core::CryptoRng;
use zeroize::Zeroizing;

/// Bytes on the heap, so that moving their owner leaves no copy behind.
pub(crate) type Secret<const N: usize> = Box<Zeroizing<[u8; N]>>;

/// A wiped copy on the heap.
pub(crate) fn boxed<const N: usize>(bytes: &[u8; N]) -> Secret<N> {
    let mut secret = Box::new(Zeroizing::new([0; N]));
    secret.copy_from_slice(bytes);
    secret
}

/// Fresh bytes, drawn in place.
pub(crate) fn random<const N: usize>(rng: &mut impl CryptoRng) -> Secret<N> {
    let mut secret = Box::new(Zeroizing::new([0; N]));
    rng.fill_bytes(secret.as_mut_slice());
    secret
}

/// Declares how a type that holds a secret prints: its name and nothing else.
macro_rules! redacted {
    ($($type:ident),+ $(,)?) => {$(
        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(concat!(stringify!($type), "(..)"))
            }
        }
    )+};
}
pub(crate) use redacted;

/// Declares a secret of 32 bytes.
macro_rules! secret_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name($crate::secret::Secret<32>);

        impl $name {
            /// Length in bytes.
            pub const BYTES: usize = 32;

            /// Draws a fresh one.
            #[must_use]
            pub fn generate(rng: &mut impl rand_core::CryptoRng) -> Self {
                Self($crate::secret::random(rng))
            }

            /// Takes it out of custody.
            #[must_use]
            pub fn from_bytes(bytes: zeroize::Zeroizing<[u8; 32]>) -> Self {
                Self($crate::secret::boxed(&bytes))
            }

            /// The bytes, for custody.
            #[must_use]
            pub fn as_bytes(&self) -> &zeroize::Zeroizing<[u8; 32]> {
                &self.0
            }
        }

        $crate::secret::redacted!($name);
    };
}
pub(crate) use secret_newtype;
