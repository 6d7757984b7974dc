//! Bytes in JSON: fixed-size values as hex, blobs as base64 without padding.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Declares a public, fixed-size byte string shown and parsed as lower-case hex.
macro_rules! hex_newtype {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const BYTES: usize = $len;

            /// The raw bytes.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl TryFrom<&[u8]> for $name {
            type Error = $crate::bytes::WrongLength;

            fn try_from(raw: &[u8]) -> Result<Self, Self::Error> {
                raw.try_into()
                    .map(Self)
                    .map_err(|_| $crate::bytes::WrongLength { expected: $len })
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::bytes::WrongLength;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let wrong = $crate::bytes::WrongLength { expected: $len };
                if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
                    return Err(wrong);
                }
                let mut raw = [0; $len];
                hex::decode_to_slice(text, &mut raw).map_err(|_| wrong)?;
                Ok(Self(raw))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use hex_newtype;

/// A fixed-size value of the wrong length, or not lower-case hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} bytes as lower-case hex")]
pub struct WrongLength {
    /// How many bytes the value has.
    pub expected: usize,
}

/// Public bytes of variable length; base64 (RFC 4648 section 4) without padding in JSON.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Blob(pub Vec<u8>);

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl From<Vec<u8>> for Blob {
    fn from(raw: Vec<u8>) -> Self {
        Self(raw)
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&base64_simd::STANDARD_NO_PAD.encode_to_string(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        base64_simd::STANDARD_NO_PAD
            .decode_to_vec(text.as_bytes())
            .map(Self)
            .map_err(|_| de::Error::custom("not base64 without padding"))
    }
}
