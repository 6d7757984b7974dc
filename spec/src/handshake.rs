//! The payload of both handshake messages. PROTOCOL.md, "Handshake".

use crate::{
    bytes::Blob,
    cbor::{Fields, FieldsWriter},
    control::PresentedBlobs,
    keys::ML_KEM_768_EK_BYTES,
    limits::{HANDSHAKE_PADDING, MAX_HANDSHAKE_BYTES},
    log::{EntryHash, Head},
    objects::Attributes,
    signed::{ObjectError, Signed},
    trust::Presented,
};

/// What each side says of itself inside the handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// Certificate, credential and NoiseKey.
    pub presented: Presented,
    /// Opens the certificate's attrs hash; tags come only from here.
    pub attrs: Attributes,
    /// The sender's place in the trust log.
    pub head: Head,
    /// The initiator's ephemeral ML-KEM-768 encapsulation key; in message 1 only.
    pub encapsulation_key: Option<Box<[u8; ML_KEM_768_EK_BYTES]>>,
}

impl Payload {
    /// Encodes as `u16 length || map || zeros` to a multiple of 512 bytes.
    ///
    /// # Errors
    /// [`ObjectError::TooLong`] when the objects do not fit a handshake message.
    pub fn encode(&self) -> Result<Vec<u8>, ObjectError> {
        let map = FieldsWriter::new()
            .bytes(1, &self.presented.certificate.encode())
            .optional(self.presented.credential.as_ref(), |map, credential| {
                map.bytes(2, &credential.encode())
            })
            .bytes(3, &self.presented.noise_key.encode())
            .map(4, self.attrs.write())
            .uint(5, self.head.seq)
            .bytes(6, &self.head.hash.0)
            .optional(self.encapsulation_key.as_ref(), |map, key| map.bytes(7, key.as_slice()))
            .finish();
        let length = u16::try_from(map.len())
            .ok()
            .filter(|length| usize::from(*length) + 2 <= MAX_HANDSHAKE_BYTES - HANDSHAKE_PADDING)
            .ok_or(ObjectError::TooLong(MAX_HANDSHAKE_BYTES))?;
        let mut payload = [&length.to_be_bytes(), map.as_slice()].concat();
        payload.resize(payload.len().next_multiple_of(HANDSHAKE_PADDING), 0);
        Ok(payload)
    }

    /// Decodes a payload; the objects in it are parsed, not yet judged.
    ///
    /// # Errors
    /// [`ObjectError`]: every deviation from the one allowed spelling, padding included.
    pub fn decode(payload: &[u8]) -> Result<Self, ObjectError> {
        let (length, rest) = payload.split_first_chunk::<2>().ok_or(ObjectError::Envelope)?;
        let (map, padding) = rest
            .split_at_checked(usize::from(u16::from_be_bytes(*length)))
            .ok_or(ObjectError::Envelope)?;
        let shortest = (map.len() + 2).next_multiple_of(HANDSHAKE_PADDING) == payload.len();
        if !shortest || padding.iter().any(|byte| *byte != 0) {
            return Err(ObjectError::Envelope);
        }
        let mut fields = Fields::decode(map)?;
        let decoded = Self {
            presented: Presented {
                certificate: Signed::decode(fields.bytes(1)?)?,
                credential: fields.optional_bytes(2)?.map(Signed::decode).transpose()?,
                noise_key: Signed::decode(fields.bytes(3)?)?,
            },
            attrs: Attributes::read(fields.optional_map(4)?.ok_or(ObjectError::Value(4))?)?,
            head: Head { seq: fields.uint(5)?, hash: EntryHash(fields.fixed(6)?) },
            encapsulation_key: fields
                .optional_bytes(7)?
                .map(|key| key.try_into().map(Box::new).map_err(|_| ObjectError::Value(7)))
                .transpose()?,
        };
        fields.finish()?;
        Ok(decoded)
    }
}

impl Presented {
    /// The objects as a login or a list carries them.
    #[must_use]
    pub fn to_blobs(&self) -> PresentedBlobs {
        PresentedBlobs {
            certificate: Blob(self.certificate.encode()),
            credential: self.credential.as_ref().map(|credential| Blob(credential.encode())),
            noise_key: Blob(self.noise_key.encode()),
        }
    }

    /// Parses what a login or a list carries; nothing is verified yet.
    ///
    /// # Errors
    /// [`ObjectError`] of the first object that is malformed.
    pub fn from_blobs(blobs: &PresentedBlobs) -> Result<Self, ObjectError> {
        Ok(Self {
            certificate: Signed::decode(&blobs.certificate.0)?,
            credential: blobs
                .credential
                .as_ref()
                .map(|credential| Signed::decode(&credential.0))
                .transpose()?,
            noise_key: Signed::decode(&blobs.noise_key.0)?,
        })
    }
}
