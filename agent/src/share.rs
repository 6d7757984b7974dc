//! Shares: some services of a workspace for a guest, until a time. PROTOCOL.md, "Shares".
//!
//! A share is a credential; whoever joins by its code is a guest with a home of its own. The agents that
//! expose the services hold every guest against credential and trust log.

use std::time::Duration;

use connect_crypto::{
    epoch::ShareSecret,
    invite::{Invite, InviteKeys, InviteSeed, ShareGrant},
};
use connect_spec::{
    bytes::Blob,
    control::{ListedCredential, Request},
    ids::{CredentialId, Label, ServiceId, ServiceName},
    limits::MAX_SHARED_SERVICES,
    objects::{AgentRole, Credential, CredentialKind, Issuer, ShareRecord, UnixTime},
    signed::Signed,
};
use serde::Serialize;
use zeroize::Zeroizing;

use crate::{
    clock,
    directory::{Directory, ListedMember},
    error::{Error, ErrorKind, Result},
    govern::Governor,
    identity::Identity,
    random,
};

/// A share that was just made. Debug output shows no secret.
#[derive(Debug)]
pub struct NewShare {
    /// What its guest joins by: a secret.
    pub code: Zeroizing<String>,
    /// The share, for people.
    pub info: ShareInfo,
}

/// A share that is not closed, for people.
#[derive(Debug, Clone, Serialize)]
pub struct ShareInfo {
    /// Its id.
    pub id: CredentialId,
    /// What its maker called it; its id where the maker's word cannot be read.
    pub label: String,
    /// What its services were called when it was made.
    pub services: Vec<String>,
    /// How many guests may join by it.
    pub uses: u32,
    /// How many did, as the hub says.
    pub used: u32,
    /// Until when it counts.
    pub expires: UnixTime,
    /// Whether that time is over.
    pub over: bool,
    /// Who joined.
    pub guests: Vec<GuestInfo>,
}

/// A guest, for its hosts.
#[derive(Debug, Clone, Serialize)]
pub struct GuestInfo {
    /// Its id.
    pub agent_id: connect_spec::ids::AgentId,
    /// What it calls itself.
    pub label: String,
    /// Whether it is connected to the hub.
    pub online: bool,
}

impl Governor {
    /// Shares services under a label; `uses` guests may come, until `expires` from now at most.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`] for a name that nobody exposes; [`ErrorKind::Usage`] for no service or
    /// too many, and for a label that an open share has.
    pub async fn share(
        &self,
        names: &[ServiceName],
        label: &Label,
        expires: Duration,
        uses: u32,
    ) -> Result<NewShare> {
        let directory = self.directory();
        let mut named = find_all(directory, names).await?;
        if shares(directory).await?.iter().any(|share| share.label == label.as_str()) {
            return Err(Error::new(ErrorKind::Usage, format_args!("a share is called `{label}`"))
                .hint("choose another `--name`, or end that one: `connect unshare`"));
        }
        named.sort_by_key(|(id, _)| *id);
        named.dedup();
        let identity = directory.workspace().identity();
        let seed = InviteSeed::generate(&mut random::rng());
        let keys = InviteKeys::derive(&seed);
        let id = CredentialId::of(&keys.signing.public());
        let realm = &identity.epochs.current().secrets.realm;
        let secret = ShareSecret::derive(realm, &id);
        let invite = Invite {
            hub: identity.hub.clone(),
            workspace_id: identity.workspace_id(),
            head: identity.trust.head(),
            seed,
            tags: Vec::new(),
            share: Some(ShareGrant { secret, label: label.clone() }),
        };
        let attrs = invite.attributes().map_err(|tag| Error::new(ErrorKind::Other, tag))?;
        let end = clock::now().saturating_add(expires.as_secs());
        let (services, names): (Vec<_>, Vec<_>) = named.into_iter().unzip();
        let credential = self.key().sign(&Credential {
            workspace_id: invite.workspace_id,
            kind: CredentialKind::Share,
            invite_key: keys.signing.public(),
            role: AgentRole::Guest,
            attrs: attrs.hash(),
            services: Some(services),
            uses,
            join_until: end,
            certs_end: end,
            issuer: self.key().public(),
            wrap_key_hash: keys.wrap.public().hash(),
        });
        let record = ShareRecord {
            workspace_id: invite.workspace_id,
            share_id: id,
            label: label.clone(),
            names: names.clone(),
        };
        let record = identity
            .share_epoch(&id)
            .names
            .seal_share(&self.key().sign(&record), &mut random::rng())
            .map_err(|error| Error::new(ErrorKind::Other, error))?;
        let credential = Blob(credential.encode());
        directory.session().request(Request::CreateShare { credential, record }).await?;
        Ok(NewShare {
            code: invite.reveal(),
            info: ShareInfo {
                id,
                label: label.to_string(),
                services: names.iter().map(ToString::to_string).collect(),
                uses,
                used: 0,
                expires: end,
                over: false,
                guests: Vec::new(),
            },
        })
    }

    /// Ends a share, named by its label or id: its guests lose what they reach, at once and for good.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when no open share, or more than one, is called so.
    pub async fn unshare(&self, wanted: &str) -> Result<(ShareInfo, u64)> {
        let mut found = shares(self.directory()).await?;
        found.retain(|share| share.label == wanted || share.id.to_string() == wanted);
        if found.len() > 1 {
            let ids: Vec<_> = found.iter().map(|share| share.id.to_string()).collect();
            return Err(Error::new(
                ErrorKind::Usage,
                format_args!("{} shares are called `{wanted}`: {}", ids.len(), ids.join(", ")),
            )
            .hint("name one of them by its id"));
        }
        let share = found.pop().ok_or_else(|| {
            Error::new(ErrorKind::Usage, format_args!("no open share is called `{wanted}`"))
                .hint("`connect shares` lists them")
        })?;
        let seq = self.close(share.id, Vec::new()).await?;
        Ok((share, seq))
    }
}

/// The services of these names.
async fn find_all(
    directory: &Directory,
    names: &[ServiceName],
) -> Result<Vec<(ServiceId, ServiceName)>> {
    if names.is_empty() || names.len() > MAX_SHARED_SERVICES {
        return Err(Error::new(
            ErrorKind::Usage,
            format_args!("a share names 1 to {MAX_SHARED_SERVICES} services"),
        )
        .hint("make another share for the others"));
    }
    let mut found = Vec::new();
    for name in names {
        found.push((directory.find(name).await?.record.service_id, name.clone()));
    }
    Ok(found)
}

/// The shares that are not closed, and their guests.
///
/// # Errors
/// As a request to the hub.
pub async fn shares(directory: &Directory) -> Result<Vec<ShareInfo>> {
    let listed = directory.shares().await?;
    let members = if listed.is_empty() { Vec::new() } else { directory.members().await? };
    let identity = directory.workspace().identity();
    let mut infos: Vec<_> =
        listed.iter().map(|(share, row)| describe(&identity, &members, share, row)).collect();
    infos.sort_by(|left, right| (&left.label, left.id).cmp(&(&right.label, right.id)));
    Ok(infos)
}

fn describe(
    identity: &Identity,
    members: &[ListedMember],
    credential: &Signed<Credential>,
    row: &ListedCredential,
) -> ShareInfo {
    let share = credential.object();
    let id = share.id();
    let services = share.services.as_deref().unwrap_or_default();
    let record = row.record.as_ref().and_then(|record| {
        let names = identity.share_epoch(&id).names;
        let opened = names.open_share(&identity.workspace_id(), id, &share.issuer, record);
        opened.inspect_err(|error| {
            tracing::warn!(event = "left_out", share = %id, %error, "the record of a share does not hold");
        }).ok()
    });
    let record = record.as_ref().map(Signed::object);
    // Names that are not one for each service say nothing.
    let record = record.filter(|record| record.names.len() == services.len());
    let guests = members.iter().filter(|member| {
        member.presented.certificate.object().issuer == Issuer::Credential(credential.hash())
    });
    ShareInfo {
        id,
        label: record.map_or_else(|| id.to_string(), |record| record.label.to_string()),
        services: match record {
            Some(record) => record.names.iter().map(ToString::to_string).collect(),
            None => services.iter().map(ToString::to_string).collect(),
        },
        uses: share.uses,
        used: row.used,
        expires: share.certs_end,
        over: clock::now() > share.certs_end,
        guests: guests
            .map(|guest| GuestInfo {
                agent_id: guest.info.agent_id,
                label: guest.info.label.clone(),
                online: guest.info.online,
            })
            .collect(),
    }
}
