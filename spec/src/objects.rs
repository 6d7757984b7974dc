//! The signed bodies: genesis, certificate, credential, NoiseKey, and the records that are sealed.
//!
//! PROTOCOL.md, "Identity" and "Names", has the field tables.

use serde::{Deserialize, Serialize};

use crate::{
    cbor::{Fields, FieldsWriter},
    hash::hash,
    ids::{AgentId, CredentialId, Label, ServiceId, ServiceName, WorkspaceId},
    keys::{IdentityKey, StaticPublicKey},
    limits::{
        MAX_GENESIS_BYTES, MAX_OBJECT_BYTES, MAX_RECORD_PLAINTEXT_BYTES, MAX_SHARED_SERVICES,
        MAX_TAG_BYTES, MAX_TAGS,
    },
    signed::{Body, ObjectError, Signed},
};

/// Version of every body of this protocol version.
pub(crate) const BODY_VERSION: u64 = 1;

/// The one cipher suite: `Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s` with ML-KEM-768 in the psk.
pub const SUITE_1: u16 = 1;

/// Most founding signers of a genesis: all of them sign it.
const MAX_FOUNDERS: usize = 16;

/// Seconds since 1970-01-01T00:00:00Z, as a wall clock tells it. Informational: never proof of age.
pub type UnixTime = u64;

pub(crate) fn check_version(fields: &mut Fields<'_>) -> Result<(), ObjectError> {
    match fields.uint(0)? {
        BODY_VERSION => Ok(()),
        other => Err(ObjectError::Version(other)),
    }
}

/// What a signer may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SignerRole {
    /// Everything, naming other signers included.
    Owner,
    /// Issue certificates and credentials, and revoke.
    Admin,
}

/// What an agent may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentRole {
    /// Reach and expose.
    Member,
    /// Reach only.
    Reacher,
    /// Expose only.
    Exposer,
    /// Reach the services that its share names.
    Guest,
}

impl AgentRole {
    /// Whether an agent of this role may initiate a tunnel.
    #[must_use]
    pub fn may_reach(self) -> bool {
        matches!(self, Self::Member | Self::Reacher | Self::Guest)
    }

    /// Whether an agent of this role may respond to one.
    #[must_use]
    pub fn may_expose(self) -> bool {
        matches!(self, Self::Member | Self::Exposer)
    }
}

/// Declares the numbers of an enumeration on the wire.
macro_rules! wire_numbers {
    ($type:ident { $($number:literal = $variant:ident),* $(,)? }) => {
        impl $type {
            pub(crate) fn number(self) -> u64 {
                match self { $(Self::$variant => $number),* }
            }

            pub(crate) fn from_number(number: u64) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }
        }
    };
}
wire_numbers!(SignerRole { 1 = Owner, 2 = Admin });
wire_numbers!(AgentRole { 1 = Member, 2 = Reacher, 3 = Exposer, 4 = Guest });

/// One signer as a genesis or a recovery names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Founder {
    /// The signer's key.
    pub key: IdentityKey,
    /// What it may do.
    pub role: SignerRole,
}

impl Founder {
    /// Reads a list of signers: by ascending key, at least one owner.
    pub(crate) fn read_all(
        fields: &mut Fields<'_>,
        key: u64,
        max: usize,
    ) -> Result<Vec<Self>, ObjectError> {
        let mut all = Vec::new();
        for mut founder in fields.maps(key, max)? {
            let signer = founder.fixed(0)?;
            let role = SignerRole::from_number(founder.uint(1)?).ok_or(ObjectError::Value(key))?;
            founder.finish()?;
            all.push(Self { key: signer, role });
        }
        let ascending = all.is_sorted_by(|left: &Self, right| left.key < right.key);
        if !ascending || !all.iter().any(|founder| founder.role == SignerRole::Owner) {
            return Err(ObjectError::Value(key));
        }
        Ok(all)
    }

    pub(crate) fn write(&self) -> FieldsWriter {
        FieldsWriter::new().bytes(0, &self.key.0).uint(1, self.role.number())
    }
}

/// The first object of a workspace; its hash is the workspace's id and trust anchor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Genesis {
    /// Cipher suite of every handshake of the workspace: [`SUITE_1`].
    pub suite: u16,
    /// Random, so that the same founders can make two workspaces.
    pub salt: [u8; 16],
    /// The first signers, at least one owner, by ascending key.
    pub founders: Vec<Founder>,
    /// Who may restart the trust log when every signer is lost.
    pub recovery_key: IdentityKey,
    /// `H("epoch", M || W)` of epoch 0.
    pub epoch_commit: [u8; 32],
}

impl Body for Genesis {
    const KIND: &'static str = "genesis";
    const MAX_BYTES: usize = MAX_GENESIS_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let suite = fields.uint(1)?;
        if suite != SUITE_1 {
            return Err(ObjectError::Value(1));
        }
        let salt = fields.fixed(2)?;
        let founders = Founder::read_all(&mut fields, 3, MAX_FOUNDERS)?;
        let genesis = Self {
            suite,
            salt,
            founders,
            recovery_key: fields.fixed(4)?,
            epoch_commit: fields.fixed(5)?,
        };
        fields.finish()?;
        Ok(genesis)
    }

    fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .uint(1, self.suite)
            .bytes(2, &self.salt)
            .maps(3, self.founders.iter().map(Founder::write))
            .bytes(4, &self.recovery_key.0)
            .bytes(5, &self.epoch_commit)
            .finish()
    }
}

/// Who vouches for a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Issuer {
    /// A signer of the trust log, by key.
    Signer(IdentityKey),
    /// A credential, by its hash; the credential travels beside the certificate.
    Credential([u8; 32]),
}

/// Certifies that an identity key belongs to an agent of the workspace, in a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The workspace that the certificate is for.
    pub workspace_id: WorkspaceId,
    /// The certified key; the agent's id is computed from it.
    pub identity_key: IdentityKey,
    /// What the agent may do.
    pub role: AgentRole,
    /// [`Attributes::hash`] of the agent's tags.
    pub attrs: [u8; 32],
    /// Ascends with each certificate of the agent, so that a revocation can name the older ones.
    pub serial: u64,
    /// When the certificate ends, if it does.
    pub not_after: Option<UnixTime>,
    /// Who vouches for it.
    pub issuer: Issuer,
    /// What a guest may reach; absent for members.
    pub services: Option<Vec<ServiceId>>,
}

impl Certificate {
    /// The agent that this certificate is about.
    #[must_use]
    pub fn agent_id(&self) -> AgentId {
        AgentId::of(&self.workspace_id, &self.identity_key)
    }
}

fn write_services(map: FieldsWriter, key: u64, services: Option<&Vec<ServiceId>>) -> FieldsWriter {
    map.optional(services, |map, services| {
        map.byte_strings(key, services.iter().map(|service| service.0.as_slice()))
    })
}

impl Body for Certificate {
    const KIND: &'static str = "certificate";
    const MAX_BYTES: usize = MAX_OBJECT_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let certificate = Self {
            workspace_id: fields.fixed(1)?,
            identity_key: fields.fixed(2)?,
            role: AgentRole::from_number(fields.uint(3)?).ok_or(ObjectError::Value(3))?,
            attrs: fields.fixed(4)?,
            serial: fields.uint(5)?,
            not_after: fields.optional_uint(6)?,
            issuer: match fields.uint(7)? {
                0u64 => Issuer::Signer(fields.fixed(8)?),
                1 => Issuer::Credential(fields.fixed(8)?),
                _ => return Err(ObjectError::Value(7)),
            },
            services: fields.optional_fixed_array(9, MAX_SHARED_SERVICES)?,
        };
        fields.finish()?;
        Ok(certificate)
    }

    fn encode(&self) -> Vec<u8> {
        let (issuer_kind, issuer) = match &self.issuer {
            Issuer::Signer(key) => (0u8, &key.0),
            Issuer::Credential(hash) => (1, hash),
        };
        let map = FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .bytes(2, &self.identity_key.0)
            .uint(3, self.role.number())
            .bytes(4, &self.attrs)
            .uint(5, self.serial)
            .optional(self.not_after, |map, time| map.uint(6, time))
            .uint(7, issuer_kind)
            .bytes(8, issuer);
        write_services(map, 9, self.services.as_ref()).finish()
    }
}

/// What a credential admits to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CredentialKind {
    /// Membership of the workspace.
    Invite,
    /// The named services, for a while.
    Share,
}
wire_numbers!(CredentialKind { 1 = Invite, 2 = Share });

/// Lets the holder of a fresh key sign certificates: what an invite is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// The workspace that it admits to.
    pub workspace_id: WorkspaceId,
    /// Membership or a share.
    pub kind: CredentialKind,
    /// The key, derived from the invite's seed, that signs the certificates.
    pub invite_key: IdentityKey,
    /// Role of every certificate under it.
    pub role: AgentRole,
    /// [`Attributes::hash`] of every certificate under it.
    pub attrs: [u8; 32],
    /// The services of a share.
    pub services: Option<Vec<ServiceId>>,
    /// How many agents may join by it.
    pub uses: u32,
    /// Until when they may join.
    pub join_until: UnixTime,
    /// Until when certificates under it count, unless a closure keeps them.
    pub certs_end: UnixTime,
    /// The signer that issued it.
    pub issuer: IdentityKey,
    /// Hash of the key that M and W are wrapped to.
    pub wrap_key_hash: [u8; 32],
}

impl Credential {
    /// The id by which the hub and the log know the credential.
    #[must_use]
    pub fn id(&self) -> CredentialId {
        CredentialId::of(&self.invite_key)
    }
}

impl Body for Credential {
    const KIND: &'static str = "credential";
    const MAX_BYTES: usize = MAX_OBJECT_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let credential = Self {
            workspace_id: fields.fixed(1)?,
            kind: CredentialKind::from_number(fields.uint(2)?).ok_or(ObjectError::Value(2))?,
            invite_key: fields.fixed(3)?,
            role: AgentRole::from_number(fields.uint(4)?).ok_or(ObjectError::Value(4))?,
            attrs: fields.fixed(5)?,
            services: fields.optional_fixed_array(6, MAX_SHARED_SERVICES)?,
            uses: fields.uint(7)?,
            join_until: fields.uint(8)?,
            certs_end: fields.uint(9)?,
            issuer: fields.fixed(10)?,
            wrap_key_hash: fields.fixed(11)?,
        };
        // A share has a guest and services, an invite neither: nothing in between exists.
        let is_share = credential.kind == CredentialKind::Share;
        if is_share != (credential.role == AgentRole::Guest) {
            return Err(ObjectError::Value(4));
        }
        if is_share != credential.services.is_some() {
            return Err(ObjectError::Value(6));
        }
        if credential.uses == 0 {
            return Err(ObjectError::Value(7));
        }
        fields.finish()?;
        Ok(credential)
    }

    fn encode(&self) -> Vec<u8> {
        let map = FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .uint(2, self.kind.number())
            .bytes(3, &self.invite_key.0)
            .uint(4, self.role.number())
            .bytes(5, &self.attrs);
        write_services(map, 6, self.services.as_ref())
            .uint(7, self.uses)
            .uint(8, self.join_until)
            .uint(9, self.certs_end)
            .bytes(10, &self.issuer.0)
            .bytes(11, &self.wrap_key_hash)
            .finish()
    }
}

/// Binds an agent's Noise static key to its identity key; rotated by the agent alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoiseKey {
    /// The workspace that the key is used in.
    pub workspace_id: WorkspaceId,
    /// The agent that holds it.
    pub agent_id: AgentId,
    /// The suite that it is for.
    pub suite: u16,
    /// Ascends with each rotation; the same counter with another key is a cloned machine.
    pub counter: u64,
    /// The X25519 static key.
    pub static_key: StaticPublicKey,
    /// Hash of the key that later epochs are wrapped to.
    pub wrap_key_hash: [u8; 32],
}

impl Body for NoiseKey {
    const KIND: &'static str = "noise-key";
    const MAX_BYTES: usize = MAX_OBJECT_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let noise_key = Self {
            workspace_id: fields.fixed(1)?,
            agent_id: fields.fixed(2)?,
            suite: fields.uint(3)?,
            counter: fields.uint(4)?,
            static_key: fields.fixed(5)?,
            wrap_key_hash: fields.fixed(6)?,
        };
        if noise_key.suite != SUITE_1 {
            return Err(ObjectError::Value(3));
        }
        fields.finish()?;
        Ok(noise_key)
    }

    fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .bytes(2, &self.agent_id.0)
            .uint(3, self.suite)
            .uint(4, self.counter)
            .bytes(5, &self.static_key.0)
            .bytes(6, &self.wrap_key_hash)
            .finish()
    }
}

/// An agent's tags with the salt that hides them from whoever sees only the certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// Random salt.
    pub salt: [u8; 16],
    /// Tags, ascending, each 1 to 32 bytes of `[a-z0-9-]`.
    pub tags: Vec<String>,
}

impl Attributes {
    /// Puts tags in their canonical order.
    ///
    /// # Errors
    /// The tag that is not 1 to 32 characters of `[a-z0-9-]`, or the 17th one.
    pub fn new(salt: [u8; 16], mut tags: Vec<String>) -> Result<Self, String> {
        tags.sort();
        tags.dedup();
        if let Some(bad) = tags.iter().find(|tag| !is_tag(tag)).or(tags.get(MAX_TAGS)) {
            return Err(bad.clone());
        }
        Ok(Self { salt, tags })
    }

    /// `H("attrs", salt || cbor {0: [tags]})`.
    #[must_use]
    pub fn hash(&self) -> [u8; 32] {
        let tags = FieldsWriter::new().texts(0, self.tags.iter().map(String::as_str)).finish();
        hash("attrs", &[&self.salt, &tags])
    }

    pub(crate) fn write(&self) -> FieldsWriter {
        FieldsWriter::new().bytes(0, &self.salt).texts(1, self.tags.iter().map(String::as_str))
    }

    pub(crate) fn read(mut fields: Fields<'_>) -> Result<Self, ObjectError> {
        let salt = fields.fixed(0)?;
        let tags: Vec<String> = fields
            .optional_texts(1, MAX_TAGS)?
            .ok_or(ObjectError::Value(1))?
            .into_iter()
            .map(str::to_owned)
            .collect();
        fields.finish()?;
        if !tags.iter().all(|tag| is_tag(tag)) || !tags.is_sorted_by(|left, right| left < right) {
            return Err(ObjectError::Value(1));
        }
        Ok(Self { salt, tags })
    }
}

/// Whether a text can be the tag of an agent.
#[must_use]
pub fn is_tag(tag: &str) -> bool {
    (1..=MAX_TAG_BYTES).contains(&tag.len())
        && tag.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-')
}

/// What an exposer publishes about a service, sealed so that the hub cannot read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceRecord {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The service.
    pub service_id: ServiceId,
    /// The exposer.
    pub agent_id: AgentId,
    /// Ascends with each version of the record.
    pub counter: u32,
    /// The epoch whose name key sealed it.
    pub epoch: u32,
    /// The name by which it is reached.
    pub name: ServiceName,
    /// A hint for people and clients: `postgres`, `http`, `tcp`.
    pub protocol: String,
    /// The exposer's certificate.
    pub certificate: Signed<Certificate>,
    /// The credential under which the certificate was made, if one was.
    pub credential: Option<Signed<Credential>>,
    /// The exposer's static key.
    pub noise_key: Signed<NoiseKey>,
    /// Port of the target, so that reachers can offer the familiar one; never its host.
    pub port_hint: Option<u16>,
    /// Whether the target answered when the exposer last looked.
    pub target_ok: Option<bool>,
}

/// Bytes of the protocol hint.
const MAX_PROTOCOL_BYTES: usize = 16;

impl Body for ServiceRecord {
    const KIND: &'static str = "service-record";
    const MAX_BYTES: usize = MAX_RECORD_PLAINTEXT_BYTES - 256;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let record = Self {
            workspace_id: fields.fixed(1)?,
            service_id: fields.fixed(2)?,
            agent_id: fields.fixed(3)?,
            counter: fields.uint(4)?,
            epoch: fields.uint(5)?,
            name: canonical_name(6, fields.text(6)?)?,
            protocol: fields.text(7)?.to_owned(),
            certificate: Signed::decode(fields.bytes(8)?)?,
            credential: fields.optional_bytes(9)?.map(Signed::decode).transpose()?,
            noise_key: Signed::decode(fields.bytes(10)?)?,
            port_hint: match fields.optional_uint(11)? {
                Some(port) => Some(u16::try_from(port).map_err(|_| ObjectError::Value(11))?),
                None => None,
            },
            target_ok: fields.optional_bool(12)?,
        };
        let protocol_fits = (1..=MAX_PROTOCOL_BYTES).contains(&record.protocol.len())
            && record.protocol.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !protocol_fits {
            return Err(ObjectError::Value(7));
        }
        fields.finish()?;
        Ok(record)
    }

    fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .bytes(2, &self.service_id.0)
            .bytes(3, &self.agent_id.0)
            .uint(4, self.counter)
            .uint(5, self.epoch)
            .text(6, self.name.as_str())
            .text(7, &self.protocol)
            .bytes(8, &self.certificate.encode())
            .optional(self.credential.as_ref(), |map, credential| {
                map.bytes(9, &credential.encode())
            })
            .bytes(10, &self.noise_key.encode())
            .optional(self.port_hint, |map, port| map.uint(11, port))
            .optional(self.target_ok, |map, ok| map.bool(12, ok))
            .finish()
    }
}

/// A name on the wire is already folded: the folding is for people.
fn canonical_name(field: u64, text: &str) -> Result<ServiceName, ObjectError> {
    let name: ServiceName = text.parse().map_err(|_| ObjectError::Value(field))?;
    if name.as_str() == text { Ok(name) } else { Err(ObjectError::Value(field)) }
}

/// What an agent publishes about itself, sealed so that the hub cannot read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentRecord {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The agent.
    pub agent_id: AgentId,
    /// Ascends with each version of the record.
    pub counter: u32,
    /// The epoch whose name key sealed it.
    pub epoch: u32,
    /// What people call the agent.
    pub label: Label,
    /// The tags of its certificate, for display.
    pub attrs: Attributes,
}

impl Body for AgentRecord {
    const KIND: &'static str = "agent-record";
    const MAX_BYTES: usize = MAX_OBJECT_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let record = Self {
            workspace_id: fields.fixed(1)?,
            agent_id: fields.fixed(2)?,
            counter: fields.uint(3)?,
            epoch: fields.uint(4)?,
            label: fields.text(5)?.parse().map_err(|_| ObjectError::Value(5))?,
            attrs: Attributes::read(fields.optional_map(6)?.ok_or(ObjectError::Value(6))?)?,
        };
        fields.finish()?;
        Ok(record)
    }

    fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .bytes(2, &self.agent_id.0)
            .uint(3, self.counter)
            .uint(4, self.epoch)
            .text(5, self.label.as_str())
            .map(6, self.attrs.write())
            .finish()
    }
}

/// What the signer who made a share says of it to the members, sealed under the share's own keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareRecord {
    /// The workspace.
    pub workspace_id: WorkspaceId,
    /// The share.
    pub share_id: CredentialId,
    /// What people call it.
    pub label: Label,
    /// What its services were called when it was made, in the order of its credential.
    pub names: Vec<ServiceName>,
}

impl Body for ShareRecord {
    const KIND: &'static str = "share-record";
    const MAX_BYTES: usize = MAX_OBJECT_BYTES;

    fn decode(body: &[u8]) -> Result<Self, ObjectError> {
        let mut fields = Fields::decode(body)?;
        check_version(&mut fields)?;
        let names = fields.optional_texts(4, MAX_SHARED_SERVICES)?.ok_or(ObjectError::Value(4))?;
        let record = Self {
            workspace_id: fields.fixed(1)?,
            share_id: fields.fixed(2)?,
            label: fields.text(3)?.parse().map_err(|_| ObjectError::Value(3))?,
            names: names
                .into_iter()
                .map(|name| canonical_name(4, name))
                .collect::<Result<_, _>>()?,
        };
        fields.finish()?;
        Ok(record)
    }

    fn encode(&self) -> Vec<u8> {
        FieldsWriter::new()
            .uint(0, BODY_VERSION)
            .bytes(1, &self.workspace_id.0)
            .bytes(2, &self.share_id.0)
            .text(3, self.label.as_str())
            .texts(4, self.names.iter().map(ServiceName::as_str))
            .finish()
    }
}
