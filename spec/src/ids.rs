//! Identifiers and names. PROTOCOL.md, "Identity" and "Names".

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    bytes::hex_newtype,
    hash::hash16,
    keys::IdentityKey,
    limits::{MAX_LABEL_BYTES, MAX_NAME_BYTES},
};

hex_newtype!(
    /// `H("genesis", body)`: the workspace's name and its trust anchor in one.
    WorkspaceId,
    32
);
hex_newtype!(
    /// `H("agent-id", workspace_id || identity_key)[..16]`.
    AgentId,
    16
);
hex_newtype!(
    /// 16 random bytes chosen by the exposer; stable for as long as the service is exposed.
    ServiceId,
    16
);
hex_newtype!(
    /// 16 random bytes chosen by the reacher for each tunnel that it tries to open.
    TunnelId,
    16
);
hex_newtype!(
    /// 16 random bytes chosen by the reacher for each conversation about a service.
    ChannelId,
    16
);
hex_newtype!(
    /// `H("credential-id", invite_key)[..16]`; for a share it is the share id too.
    CredentialId,
    16
);
hex_newtype!(
    /// `KDF(index_key, name)[..16]`: where the hub finds a service whose name it cannot read.
    LookupTag,
    16
);

impl CredentialId {
    /// In place of a share's id: none, as between members.
    pub const NONE: Self = Self([0; 16]);
}

impl AgentId {
    /// Computes the id of the agent that holds `identity` in `workspace`.
    #[must_use]
    pub fn of(workspace: &WorkspaceId, identity: &IdentityKey) -> Self {
        Self(hash16("agent-id", &[&workspace.0, &identity.0]))
    }

    /// The first eight hex digits, for people and logs.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}

impl CredentialId {
    /// Computes the id of the credential whose certificates `invite_key` signs.
    #[must_use]
    pub fn of(invite_key: &IdentityKey) -> Self {
        Self(hash16("credential-id", &[&invite_key.0]))
    }
}

/// The name of a service: `[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`, as a DNS label (RFC 1123 section 2.1).
///
/// Parsing folds A–Z; everything else that does not fit is refused.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServiceName(String);

/// Why a text is no service name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing is there.
    #[error("a service name cannot be empty")]
    Empty,
    /// More than 63 characters.
    #[error("a service name has at most {MAX_NAME_BYTES} characters, this one has {0}")]
    TooLong(usize),
    /// A character outside the alphabet.
    #[error("a service name has only letters, digits and hyphens, not {0:?}")]
    BadCharacter(char),
    /// A hyphen at either end.
    #[error("a service name cannot begin or end with a hyphen")]
    OuterHyphen,
}

impl ServiceName {
    /// The name, folded.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ServiceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        let characters = text.chars().count();
        if characters > MAX_NAME_BYTES {
            return Err(NameError::TooLong(characters));
        }
        if let Some(bad) = text.chars().find(|c| !c.is_ascii_alphanumeric() && *c != '-') {
            return Err(NameError::BadCharacter(bad));
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(NameError::OuterHyphen);
        }
        Ok(Self(text.to_ascii_lowercase()))
    }
}

impl TryFrom<String> for ServiceName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ServiceName> for String {
    fn from(name: ServiceName) -> Self {
        name.0
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServiceName({})", self.0)
    }
}

/// What people call an agent: 1 to 64 bytes of UTF-8 without control characters.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

/// Why a text is no label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// Empty, or longer than 64 bytes.
    #[error("a label has 1 to {MAX_LABEL_BYTES} bytes, this one has {0}")]
    Length(usize),
    /// A line break, an escape or another control character, which could fool a terminal.
    #[error("a label has no control characters")]
    Control,
}

impl Label {
    /// The label as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = LabelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() || text.len() > MAX_LABEL_BYTES {
            return Err(LabelError::Length(text.len()));
        }
        if text.chars().any(char::is_control) {
            return Err(LabelError::Control);
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Label {
    type Error = LabelError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Label> for String {
    fn from(label: Label) -> Self {
        label.0
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Label({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_name(input: &str, expected: Result<&str, NameError>) {
        assert_eq!(input.parse::<ServiceName>().map(String::from), expected.map(str::to_owned));
    }

    #[test]
    fn names_are_dns_labels() {
        check_name("prod-db", Ok("prod-db"));
        check_name("a", Ok("a"));
        check_name("9", Ok("9"));
        check_name("Prod-DB", Ok("prod-db"));
        check_name(&"a".repeat(63), Ok(&"a".repeat(63)));
        check_name(&"a".repeat(64), Err(NameError::TooLong(64)));
        check_name("", Err(NameError::Empty));
        check_name("prod db", Err(NameError::BadCharacter(' ')));
        check_name("prod_db", Err(NameError::BadCharacter('_')));
        check_name("prodß", Err(NameError::BadCharacter('ß')));
        check_name("-a", Err(NameError::OuterHyphen));
        check_name("a-", Err(NameError::OuterHyphen));
    }

    #[test]
    fn labels_cannot_fool_a_terminal() {
        assert!("web server ü".parse::<Label>().is_ok());
        assert!("l".repeat(64).parse::<Label>().is_ok());
        assert_eq!("".parse::<Label>(), Err(LabelError::Length(0)));
        assert_eq!("l".repeat(65).parse::<Label>(), Err(LabelError::Length(65)));
        assert_eq!("a\x1b[2Jb".parse::<Label>(), Err(LabelError::Control));
    }

    #[test]
    fn ids_are_lower_case_hex_of_their_length() {
        let id: AgentId = "000102030405060708090a0b0c0d0e0f".parse().expect("32 digits");
        assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0e0f");
        assert_eq!(id.short(), "00010203");
        assert!("000102030405060708090A0B0C0D0E0F".parse::<AgentId>().is_err());
        assert!("0001".parse::<AgentId>().is_err());
        assert!("zz0102030405060708090a0b0c0d0e0f".parse::<AgentId>().is_err());
    }
}
