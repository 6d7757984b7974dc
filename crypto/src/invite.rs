//! The invite: one line that brings a new agent into a workspace. PROTOCOL.md, "Invites".

use std::{fmt, str::FromStr};

use bech32::{
    Bech32m, Fe32IterExt, Hrp,
    primitives::{decode::CheckedHrpstring, iter::ByteIterExt},
};
use connect_spec::{
    cbor::{CborError, Fields, FieldsWriter},
    ids::{Label, WorkspaceId},
    limits::{MAX_HUB_URL_BYTES, MAX_INVITE_CHARS, MAX_TAGS},
    log::{EntryHash, Head},
    objects::Attributes,
};
use zeroize::Zeroizing;

use crate::{
    epoch::ShareSecret,
    kdf::kdf,
    keys::{SigningKey, WrapKeypair},
    secret::{redacted, secret_newtype},
};

/// Where a hub is, and the certificate that it must show when nobody else vouches for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubAddress {
    /// Scheme, host and port.
    pub url: String,
    /// SHA-256 of the hub's certificate (DER), when it is pinned.
    pub pin: Option<[u8; 32]>,
}

/// Why a text is no hub address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HubAddressError {
    /// It does not begin with one of the four schemes, in lower case, and a host.
    #[error("a hub address begins with http://, https://, ws:// or wss://")]
    Scheme,
    /// The URL is too long.
    #[error("a hub address has at most {MAX_HUB_URL_BYTES} characters")]
    TooLong,
    /// A space, a control character or one outside ASCII.
    #[error("a hub address has only printable ASCII characters")]
    Character,
    /// What follows `#` is not `sha256=` and 64 lower-case hex digits.
    #[error("a certificate pin is `#sha256=` and 64 lower-case hex digits")]
    Pin,
}

const PIN_PREFIX: &str = "sha256=";

impl FromStr for HubAddress {
    type Err = HubAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (url, pin) = match text.split_once('#') {
            Some((url, fragment)) => {
                let digits = fragment.strip_prefix(PIN_PREFIX).ok_or(HubAddressError::Pin)?;
                let mut pin = [0; 32];
                hex::decode_to_slice(digits, &mut pin).map_err(|_| HubAddressError::Pin)?;
                if hex::encode(pin) != digits {
                    return Err(HubAddressError::Pin);
                }
                (url, Some(pin))
            }
            None => (text, None),
        };
        if url.len() > MAX_HUB_URL_BYTES {
            return Err(HubAddressError::TooLong);
        }
        if !url.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(HubAddressError::Character);
        }
        let host = ["http://", "https://", "ws://", "wss://"]
            .into_iter()
            .find_map(|scheme| url.strip_prefix(scheme))
            .ok_or(HubAddressError::Scheme)?;
        if host.is_empty() || host.starts_with('/') {
            return Err(HubAddressError::Scheme);
        }
        Ok(Self { url: url.to_owned(), pin })
    }
}

impl fmt::Display for HubAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)?;
        match self.pin {
            Some(pin) => write!(f, "#{PIN_PREFIX}{}", hex::encode(pin)),
            None => Ok(()),
        }
    }
}

secret_newtype!(
    /// What every key of an invite is derived from. Never sent to the hub.
    InviteSeed
);

/// The keys of an invite's holder.
pub struct InviteKeys {
    /// Signs the certificate of the agent that joins.
    pub signing: SigningKey,
    /// Opens the wrap of the epoch's secrets.
    pub wrap: WrapKeypair,
}

redacted!(InviteKeys);

impl InviteKeys {
    /// Derives the keys: Ed25519 seed `KDF(seed, "invite signing")`, wrap seed
    /// `KDF(seed, "invite wrap x25519") || KDF(seed, "invite wrap d") || KDF(seed, "invite wrap z")`.
    #[must_use]
    pub fn derive(seed: &InviteSeed) -> Self {
        let part = |label: &[u8]| kdf(seed.as_bytes(), label);
        let mut wrap = Zeroizing::new([0; 96]);
        wrap[..32].copy_from_slice(part(b"invite wrap x25519").as_slice());
        wrap[32..64].copy_from_slice(part(b"invite wrap d").as_slice());
        wrap[64..].copy_from_slice(part(b"invite wrap z").as_slice());
        Self {
            signing: SigningKey::from_seed(part(b"invite signing")),
            wrap: WrapKeypair::from_seed(wrap),
        }
    }
}

/// An invite. Whoever reads it can join: [`Invite::reveal`] is the only way to text.
#[derive(Debug)]
pub struct Invite {
    /// The hub.
    pub hub: HubAddress,
    /// The workspace: the anchor of all trust of the new agent.
    pub workspace_id: WorkspaceId,
    /// A place in the trust log that the hub must be able to show.
    pub head: Head,
    /// What the invite's keys are derived from.
    pub seed: InviteSeed,
    /// The tags of whoever joins; the credential, which the hub sees, has only their salted hash.
    pub tags: Vec<String>,
    /// What makes it the code of a share: whoever joins is a guest.
    pub share: Option<ShareGrant>,
}

/// What the code of a share has beside that of an invite.
#[derive(Debug)]
pub struct ShareGrant {
    /// Held by the guest in place of the secrets of an epoch.
    pub secret: ShareSecret,
    /// What its giver calls the share.
    pub label: Label,
}

/// Why a text is no invite that this program can use. Quotes nothing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// It does not begin with `pc1`.
    #[error("not an invite: an invite begins with `pc1`")]
    NotAnInvite,
    /// Longer than any invite.
    #[error("too long to be an invite: an invite has at most {MAX_INVITE_CHARS} characters")]
    TooLong,
    /// The checksum does not hold.
    #[error("the invite is damaged: a character is wrong or missing; copy it again as a whole")]
    Damaged,
    /// Made by a newer program.
    #[error("the invite has version {0}, which needs a newer `connect`")]
    Version(u64),
    /// The checksum holds, but the contents make no sense: the program that made it is at fault.
    #[error("the invite is not one that a `connect` could have made")]
    Contents,
}

/// What invites begin with, before the separator `1`.
const HRP: Hrp = Hrp::parse_unchecked("pc");
const PREFIX: &str = "pc1";
const INVITE_VERSION: u64 = 1;

impl From<CborError> for InviteError {
    fn from(_: CborError) -> Self {
        Self::Contents
    }
}

impl FromStr for Invite {
    type Err = InviteError;

    /// Reads an invite; white space around it is ignored, as pasting adds it.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        if text.get(..PREFIX.len()) != Some(PREFIX) {
            return Err(InviteError::NotAnInvite);
        }
        if text.len() > MAX_INVITE_CHARS {
            return Err(InviteError::TooLong);
        }
        let checked = CheckedHrpstring::new::<Bech32m>(text).map_err(|_| InviteError::Damaged)?;
        if checked.hrp() != HRP {
            return Err(InviteError::Damaged);
        }
        let mut body = Zeroizing::new(Vec::with_capacity(MAX_INVITE_CHARS));
        body.extend(checked.byte_iter());
        // The bits that pad the last character have one value only.
        if *line(&body) != *text {
            return Err(InviteError::Contents);
        }
        Self::decode(&body)
    }
}

impl Invite {
    fn decode(body: &[u8]) -> Result<Self, InviteError> {
        let mut fields = Fields::decode(body)?;
        match fields.uint(0)? {
            INVITE_VERSION => {}
            other => return Err(InviteError::Version(other)),
        }
        let url: HubAddress = fields.text(1)?.parse().map_err(|_| InviteError::Contents)?;
        if url.pin.is_some() {
            return Err(InviteError::Contents);
        }
        let pin = match fields.optional_bytes(2)? {
            Some(pin) => Some(pin.try_into().map_err(|_| InviteError::Contents)?),
            None => None,
        };
        let workspace_id = fields.fixed(3)?;
        let head = Head { seq: fields.uint(4)?, hash: EntryHash(fields.fixed(5)?) };
        if head.seq == 0 && head != Head::genesis(workspace_id) {
            return Err(InviteError::Contents);
        }
        let tags = fields.optional_texts(6, MAX_TAGS)?.unwrap_or_default();
        let tags = tags.into_iter().map(str::to_owned).collect();
        let seed = Zeroizing::new(fields.fixed(7)?);
        let share = match fields.optional_bytes(8)? {
            Some(secret) => {
                let secret = secret.try_into().map(Zeroizing::new);
                let secret = ShareSecret::from_bytes(secret.map_err(|_| InviteError::Contents)?);
                let label = fields.text(9)?.parse().map_err(|_| InviteError::Contents)?;
                Some(ShareGrant { secret, label })
            }
            None => None,
        };
        fields.finish()?;
        Ok(Self {
            hub: HubAddress { url: url.url, pin },
            workspace_id,
            head,
            seed: InviteSeed::from_bytes(seed),
            tags,
            share,
        })
    }

    /// What the certificate of whoever joins says of its tags; the salt is
    /// `KDF(seed, "invite attrs")[..16]`.
    ///
    /// # Errors
    /// The tag that cannot be one, or the 17th.
    pub fn attributes(&self) -> Result<Attributes, String> {
        let salt = kdf(self.seed.as_bytes(), b"invite attrs");
        Attributes::new(*salt.first_chunk().expect("32 bytes begin with 16"), self.tags.clone())
    }

    /// The invite as one line, `pc1…`. It is a secret as long as the invite can be used.
    #[must_use]
    pub fn reveal(&self) -> Zeroizing<String> {
        // The writer wipes nothing: it gets zeros, and the secrets go in afterwards.
        let upto_seed = FieldsWriter::new()
            .uint(0, INVITE_VERSION)
            .text(1, &self.hub.url)
            .optional(self.hub.pin.as_ref(), |map, pin| map.bytes(2, pin))
            .bytes(3, &self.workspace_id.0)
            .uint(4, self.head.seq)
            .bytes(5, &self.head.hash.0)
            .optional((!self.tags.is_empty()).then_some(&self.tags), |map, tags| {
                map.texts(6, tags.iter().map(String::as_str))
            })
            .bytes(7, &[0; InviteSeed::BYTES]);
        // The head of the map is one byte, however many of these fields there are.
        let seed_end = upto_seed.clone().finish().len();
        let upto_secret = upto_seed
            .optional(self.share.as_ref(), |map, _| map.bytes(8, &[0; ShareSecret::BYTES]));
        let secret_end = upto_secret.clone().finish().len();
        let whole = upto_secret
            .optional(self.share.as_ref(), |map, share| map.text(9, share.label.as_str()));
        let mut body = Zeroizing::new(whole.finish());
        let seed = self.seed.as_bytes();
        body[seed_end - seed.len()..seed_end].copy_from_slice(seed.as_slice());
        if let Some(share) = &self.share {
            let secret = share.secret.as_bytes();
            body[secret_end - secret.len()..secret_end].copy_from_slice(secret.as_slice());
        }
        line(&body)
    }
}

fn line(body: &[u8]) -> Zeroizing<String> {
    let mut line = Zeroizing::new(String::with_capacity(MAX_INVITE_CHARS));
    line.extend(body.iter().copied().bytes_to_fes().with_checksum::<Bech32m>(&HRP).chars());
    line
}
