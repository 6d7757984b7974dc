//! What the hub lists, read with eyes of our own: every record is opened and verified, and one that
//! does not hold is an error or left out, never shown.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use connect_spec::{
    audit::{ApiKeyId, Scope},
    control::{
        ApiKey, ListedAgent, ListedApiKey, ListedCredential, ListedService, Reply, Request,
        SealedRecord, SessionKind,
    },
    ids::{AgentId, CredentialId, Label, ServiceId, ServiceName},
    objects::{
        AgentRecord, AgentRole, Attributes, Credential, CredentialKind, ServiceRecord, UnixTime,
    },
    signed::Signed,
    trust::{Presented, TrustError, VerifiedPeer},
    verify::SafetyNumber,
};
use serde::Serialize;

use crate::{
    clock,
    error::{Error, ErrorKind, Result},
    home::Home,
    identity::{Epoch, Identity},
    io::{
        dial::HubUrl,
        hub::{Greeted, Session},
    },
    random,
    workspace::Workspace,
};

/// Agents are called by as much of their id as people are shown of it.
const SHORTEST_ID: usize = 8;

/// A session through which one agent asks the hub for names, services and agents.
#[derive(Debug)]
pub struct Directory {
    workspace: Arc<Workspace>,
    session: Arc<Session>,
}

/// A service whose record and exposer are verified.
#[derive(Debug, Clone)]
pub(crate) struct FoundService {
    pub(crate) record: ServiceRecord,
    pub(crate) exposer: VerifiedPeer,
    pub(crate) online: bool,
}

/// A service, for people.
#[derive(Debug, Clone, Serialize)]
pub struct ServiceInfo {
    /// Its name.
    pub name: ServiceName,
    /// Its id.
    pub service_id: ServiceId,
    /// Its exposer.
    pub agent: AgentId,
    /// What people call the exposer; unique among the listed ones.
    pub label: String,
    /// Whether the exposer is connected to the hub.
    pub online: bool,
    /// `postgres`, `http`, `tcp`, …
    pub protocol: String,
    /// Whether the target answered when the exposer last looked.
    pub target_ok: Option<bool>,
    /// What the share is called by which a guest reaches it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share: Option<String>,
}

/// An agent, for people.
#[derive(Debug, Clone, Serialize)]
pub struct AgentInfo {
    /// Its id.
    pub agent_id: AgentId,
    /// What people call it; unique among the listed ones.
    pub label: String,
    /// `member`, `reacher`, `exposer` or `guest`.
    pub role: &'static str,
    /// Its tags.
    pub tags: Vec<String>,
    /// Whether it is connected to the hub.
    pub online: bool,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// An API key that was just made. Debug output does not show it.
#[derive(Debug, Clone, Serialize)]
pub struct NewApiKey {
    /// The key: a secret.
    pub key: ApiKey,
    /// Its id.
    pub key_id: ApiKeyId,
    /// Until when it is valid.
    pub expires_at: UnixTime,
}

/// An API key, for people.
#[derive(Debug, Clone, Serialize)]
pub struct ApiKeyInfo {
    /// What the hub knows of it.
    #[serde(flatten)]
    pub key: ListedApiKey,
    /// What people call the agent that made it.
    pub label: Option<String>,
}

/// What two people compare: see [`Directory::verify`].
#[derive(Debug, Clone)]
pub struct Verification {
    /// The other agent.
    pub agent_id: AgentId,
    /// The same on both sides, if nobody is in between.
    pub number: SafetyNumber,
}

/// An agent with what it shows of itself.
#[derive(Debug, Clone)]
pub struct ListedMember {
    /// For people.
    pub info: AgentInfo,
    /// Its label as it chose it, which others may have chosen too.
    pub(crate) own_label: String,
    pub(crate) presented: Presented,
    /// When it first logged in, as the hub says.
    pub(crate) joined_at: UnixTime,
}

/// A list that a hub never ends is cut here.
const MAX_LISTED: usize = 100_000;

impl Directory {
    /// Opens a short session of its own, beside that of an agent that may be running in the same home.
    ///
    /// # Errors
    /// [`ErrorKind::HubUnreachable`], or what the hub has against this agent;
    /// [`ErrorKind::TrustViolation`] when it shows a trust log that does not hold.
    pub async fn open(home: &Home) -> Result<Self> {
        let directory = Self::connect(Workspace::open_beside_agent(home)?).await?;
        directory.workspace.sync(&directory.session).await?;
        directory.workspace.fetch_epoch(&directory.session).await?;
        Ok(directory)
    }

    pub(crate) async fn connect(workspace: Arc<Workspace>) -> Result<Self> {
        let identity = workspace.identity();
        let hub = HubUrl::parse(&identity.hub, identity.hub_ca.as_ref())?;
        let greeted = Greeted::dial(&hub).await?;
        let (session, _) = greeted.login(&workspace, SessionKind::Command, None).await?;
        Ok(Self::new(workspace, Arc::new(session)))
    }

    pub(crate) fn new(workspace: Arc<Workspace>, session: Arc<Session>) -> Self {
        Self { workspace, session }
    }

    pub(crate) fn workspace(&self) -> &Arc<Workspace> {
        &self.workspace
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    /// Publishes this agent's label and tags, sealed.
    pub(crate) async fn publish_agent(&self, counter: u32) -> Result<()> {
        let identity = self.workspace.identity();
        let epoch = identity.epochs.current();
        let record = identity.signing.sign(&AgentRecord {
            workspace_id: identity.workspace_id(),
            agent_id: identity.agent_id,
            counter,
            epoch: epoch.number,
            label: identity.label.clone(),
            attrs: Attributes::clone(&identity.attrs),
        });
        let record = epoch
            .names
            .seal_agent(&record, &mut random::rng())
            .map_err(|error| Error::new(ErrorKind::Other, error))?;
        self.session().request(Request::PublishAgent { record }).await.map(|_| ())
    }

    /// Finds the service of a name.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`]; [`ErrorKind::TrustViolation`] when the hub shows a record under
    /// the name that does not hold.
    pub(crate) async fn find(&self, name: &ServiceName) -> Result<FoundService> {
        let mut services = self.listed(name).await?;
        if services.is_empty() {
            // Perhaps its exposer is in an epoch that this agent has not heard of yet.
            self.workspace.sync(&self.session).await?;
            self.workspace.fetch_epoch(&self.session).await?;
            services = self.listed(name).await?;
        }
        let mut found = None;
        for listed in services {
            let service = self.open_service(&listed)?;
            if service.record.name != *name {
                return Err(Error::trust(format_args!(
                    "the hub shows the record of another service under the name `{name}`"
                )));
            }
            // One name has one exposer; of an old one that is gone and a new one, the latter counts.
            if found.as_ref().is_none_or(|other: &FoundService| !other.online && service.online) {
                found = Some(service);
            }
        }
        found.ok_or_else(|| {
            Error::new(ErrorKind::ServiceNotFound, format_args!("no service is called `{name}`"))
                .hint("`connect services` lists what there is")
        })
    }

    async fn listed(&self, name: &ServiceName) -> Result<Vec<ListedService>> {
        let identity = self.workspace.identity();
        let epochs = &identity.epochs;
        let services = self.lookup(epochs.current(), name).await?;
        // An exposer that was away since the epoch changed is still listed under the one before.
        match epochs.previous().filter(|previous| self.workspace.accepts_epoch(previous.number)) {
            Some(previous) if services.is_empty() => self.lookup(previous, name).await,
            Some(_) | None => Ok(services),
        }
    }

    async fn lookup(&self, epoch: &Epoch, name: &ServiceName) -> Result<Vec<ListedService>> {
        let tag = epoch.names.tag(name);
        let Reply::Services { services, .. } =
            self.session().request(Request::Lookup { tag }).await?
        else {
            return Err(unexpected_reply());
        };
        Ok(services)
    }

    /// The epoch that a record names. The hub may name any: only the current one and, for a while, the
    /// one before are good.
    fn epoch_of<'i>(&self, identity: &'i Identity, record: &SealedRecord) -> Result<&'i Epoch> {
        let held = identity.epochs.get(record.epoch);
        held.filter(|epoch| self.workspace.accepts_epoch(epoch.number)).ok_or_else(|| {
            Error::trust(format_args!(
                "it belongs to epoch {}, which does not count here",
                record.epoch
            ))
        })
    }

    /// Opens and verifies a listed service.
    fn open_service(&self, listed: &ListedService) -> Result<FoundService> {
        let identity = self.workspace.identity();
        let does_not_hold = |error: &dyn std::fmt::Display| {
            Error::trust(format_args!(
                "the record of service {} does not hold: {error}",
                listed.service_id
            ))
        };
        let record = self
            .epoch_of(&identity, &listed.record)
            .map_err(|error| does_not_hold(&error))?
            .names
            .open_service(
                &identity.workspace_id(),
                listed.service_id,
                listed.agent_id,
                &listed.record,
            )
            .map_err(|error| does_not_hold(&error))?;
        let record = record.object().clone();
        let presented = Presented {
            certificate: record.certificate.clone(),
            credential: record.credential.clone(),
            noise_key: record.noise_key.clone(),
        };
        let exposer = identity
            .trust
            .verify_peer(listed.agent_id, presented, clock::now())
            .map_err(|error| {
                Error::trust(format_args!(
                    "the exposer of `{}` is not trusted: {error}",
                    record.name
                ))
            })?;
        if !exposer.certificate().role.may_expose() {
            return Err(Error::trust(format_args!(
                "the agent that exposes `{}` may not expose",
                record.name
            )));
        }
        Ok(FoundService { record, exposer, online: listed.online })
    }

    /// All services of the workspace whose records hold, by name.
    ///
    /// # Errors
    /// As a request to the hub.
    pub async fn services(&self) -> Result<Vec<ServiceInfo>> {
        // A guest is not told who else is there.
        let identity = self.workspace.identity();
        let share = identity.share_id().map(|_| identity.share_name());
        let agents = if share.is_some() { Vec::new() } else { self.agents().await? };
        let labels: BTreeMap<AgentId, String> =
            agents.into_iter().map(|agent| (agent.agent_id, agent.label)).collect();
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let Reply::Services { services, more } =
                self.session().request(Request::Services { after }).await?
            else {
                return Err(unexpected_reply());
            };
            let last = services.last().map(|service| service.service_id);
            for listed in services {
                match self.open_service(&listed) {
                    Ok(FoundService { record, online, .. }) => all.push(ServiceInfo {
                        name: record.name,
                        service_id: record.service_id,
                        agent: record.agent_id,
                        label: labels
                            .get(&record.agent_id)
                            .cloned()
                            .unwrap_or_else(|| record.agent_id.short()),
                        online,
                        protocol: record.protocol,
                        target_ok: record.target_ok,
                        share: share.clone(),
                    }),
                    Err(error) => {
                        tracing::warn!(event = "left_out", %error, "a service was left out")
                    }
                }
            }
            if !more || last.is_none() || last <= after || all.len() > MAX_LISTED {
                break;
            }
            after = last;
        }
        all.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(all)
    }

    /// All agents of the workspace whose certificates hold, and those that are revoked, by label.
    ///
    /// # Errors
    /// As a request to the hub.
    pub async fn agents(&self) -> Result<Vec<AgentInfo>> {
        Ok(self.members().await?.into_iter().map(|member| member.info).collect())
    }

    /// The agent of a label, or of an id or its beginning.
    ///
    /// A label with the number that a list gave it is none: whose it is changes when others join.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] when there is none, or several have the label.
    pub async fn member(&self, wanted: &str) -> Result<ListedMember> {
        let members = self.members().await?;
        let is_short = wanted.len() >= SHORTEST_ID;
        let (mut found, others): (Vec<_>, Vec<_>) = members.into_iter().partition(|member| {
            member.own_label == wanted
                || is_short && member.info.agent_id.to_string().starts_with(wanted)
        });
        if found.len() > 1 {
            let ids: Vec<_> = found.iter().map(|member| member.info.agent_id.to_string()).collect();
            return Err(Error::new(
                ErrorKind::Usage,
                format_args!("{} agents are called `{wanted}`: {}", ids.len(), ids.join(", ")),
            )
            .hint("name one of them by its id"));
        }
        found.pop().ok_or_else(|| {
            match others.iter().find(|member| member.info.label == wanted) {
                Some(listed) => Error::new(
                    ErrorKind::Usage,
                    format_args!(
                        "several agents are called `{}`, and which of them is listed as `{wanted}` changes",
                        listed.own_label
                    ),
                )
                .hint(format_args!("name it by its id: {}", listed.info.agent_id)),
                None => Error::new(ErrorKind::Usage, format_args!("no agent is called `{wanted}`"))
                    .hint("`connect agents` lists them, with their ids"),
            }
        })
    }

    /// The number that this agent and another one, named by its id or label, have in common.
    ///
    /// # Errors
    /// As [`Directory::member`]; [`ErrorKind::Usage`] when it is this agent itself.
    pub async fn verify(&self, agent: &str) -> Result<Verification> {
        let other = self.member(agent).await?;
        let identity = self.workspace.identity();
        if other.info.agent_id == identity.agent_id {
            return Err(Error::new(ErrorKind::Usage, "that is this agent itself")
                .hint("name the agent of the person you compare with"));
        }
        Ok(Verification {
            agent_id: other.info.agent_id,
            number: SafetyNumber::of(
                &identity.workspace_id(),
                &identity.signing.public(),
                &other.presented.certificate.object().identity_key,
            ),
        })
    }

    /// The agents, with what they show of themselves.
    pub(crate) async fn members(&self) -> Result<Vec<ListedMember>> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let Reply::Agents { agents, more } =
                self.session().request(Request::Agents { after }).await?
            else {
                return Err(unexpected_reply());
            };
            let last = agents.last().map(|agent| agent.agent_id);
            for listed in agents {
                match self.open_agent(&listed) {
                    Ok(member) => all.push(member),
                    Err(error) => {
                        tracing::warn!(event = "left_out", %error, "an agent was left out")
                    }
                }
            }
            if !more || last.is_none() || last <= after || all.len() > MAX_LISTED {
                break;
            }
            after = last;
        }
        make_labels_unique(&mut all);
        Ok(all)
    }

    /// The credentials that are not closed and that a signer made, and how often each was used.
    pub(crate) async fn credentials(&self) -> Result<Vec<(Signed<Credential>, u32)>> {
        let all = self.listed_credentials(|after| Request::Credentials { after }).await?;
        Ok(all.into_iter().map(|(credential, listed)| (credential, listed.used)).collect())
    }

    /// The shares among them, with what the hub lists of each.
    pub(crate) async fn shares(&self) -> Result<Vec<(Signed<Credential>, ListedCredential)>> {
        let mut all = self.listed_credentials(|after| Request::Shares { after }).await?;
        all.retain(|(credential, _)| credential.object().kind == CredentialKind::Share);
        Ok(all)
    }

    async fn listed_credentials(
        &self,
        page: impl Fn(Option<CredentialId>) -> Request,
    ) -> Result<Vec<(Signed<Credential>, ListedCredential)>> {
        let mut all = Vec::new();
        let mut after = None;
        loop {
            let Reply::Credentials { credentials, more } =
                self.session().request(page(after)).await?
            else {
                return Err(unexpected_reply());
            };
            let trust = self.workspace.identity().trust.clone();
            let before = after;
            for listed in credentials {
                let Ok(credential) = Signed::<Credential>::decode(&listed.credential.0) else {
                    continue;
                };
                let id = credential.object().id();
                after = after.max(Some(id));
                if trust.verify_credential(&credential).is_ok() && !trust.is_closed(&id) {
                    all.push((credential, listed));
                }
            }
            if !more || after == before || all.len() > MAX_LISTED {
                return Ok(all);
            }
        }
    }

    /// Makes a key with which programs read this workspace at the hub over HTTP.
    ///
    /// # Errors
    /// What the hub has against it.
    pub async fn create_api_key(
        &self,
        scopes: Vec<Scope>,
        valid_for: Duration,
    ) -> Result<NewApiKey> {
        let request = Request::CreateApiKey { scopes, valid_for: valid_for.as_secs() };
        let Reply::ApiKeyCreated { key, key_id, expires_at } =
            self.session().request(request).await?
        else {
            return Err(unexpected_reply());
        };
        Ok(NewApiKey { key, key_id, expires_at })
    }

    /// The API keys of the workspace.
    ///
    /// # Errors
    /// What the hub has against it.
    pub async fn api_keys(&self) -> Result<Vec<ApiKeyInfo>> {
        let Reply::ApiKeys { keys } = self.session().request(Request::ApiKeys).await? else {
            return Err(unexpected_reply());
        };
        let agents = self.agents().await?;
        let label = |id| agents.iter().find(|agent| agent.agent_id == id).map(|a| a.label.clone());
        let with_label = keys.into_iter().map(|key| ApiKeyInfo { label: label(key.agent_id), key });
        Ok(with_label.collect())
    }

    /// Ends an API key.
    ///
    /// # Errors
    /// What the hub has against it, such as that there is none of this id.
    pub async fn revoke_api_key(&self, key_id: ApiKeyId) -> Result<()> {
        self.session().request(Request::RevokeApiKey { key_id }).await.map(|_| ())
    }

    fn open_agent(&self, listed: &ListedAgent) -> Result<ListedMember> {
        let identity = self.workspace.identity();
        let does_not_hold = |what: &dyn std::fmt::Display| {
            Error::trust(format_args!("agent {}: {what}", listed.agent_id.short()))
        };
        let presented =
            Presented::from_blobs(&listed.presented).map_err(|error| does_not_hold(&error))?;
        let verified = identity.trust.verify_peer(listed.agent_id, presented.clone(), clock::now());
        let revoked = match verified {
            Ok(_) => false,
            // Of those who have no certificate any more, guests whose share is over are the rule.
            Err(TrustError::Revoked | TrustError::Closed | TrustError::Expired) => true,
            Err(error) => return Err(does_not_hold(&error)),
        };
        // The record of a guest is sealed under the keys of its share.
        let share = presented.credential.as_ref().map(|credential| credential.object());
        let share = share.filter(|credential| credential.kind == CredentialKind::Share);
        let share_epoch = share.map(|share| identity.share_epoch(&share.id()));
        // The id of an agent is a hash of the key that signs its record, revoked or not.
        let record = listed.record.as_ref().and_then(|record| {
            let epoch = match &share_epoch {
                Some(epoch) => epoch,
                None => identity.epochs.get(record.epoch)?,
            };
            Some(open_agent_record(&identity, epoch, &presented, record))
        });
        let (own_label, tags) = match record.transpose().map_err(|error| does_not_hold(&error))? {
            Some((label, attrs)) => (label.to_string(), attrs.tags),
            None => (listed.agent_id.short(), Vec::new()),
        };
        let role = match presented.certificate.object().role {
            AgentRole::Member => "member",
            AgentRole::Reacher => "reacher",
            AgentRole::Exposer => "exposer",
            AgentRole::Guest => "guest",
        };
        let info = AgentInfo {
            agent_id: listed.agent_id,
            label: own_label.clone(),
            role,
            tags,
            online: listed.online,
            revoked,
        };
        Ok(ListedMember { info, own_label, presented, joined_at: listed.joined_at })
    }
}

fn open_agent_record(
    identity: &Identity,
    epoch: &Epoch,
    presented: &Presented,
    record: &SealedRecord,
) -> Result<(Label, Attributes)> {
    let certificate = presented.certificate.object();
    let record = epoch
        .names
        .open_agent(
            &identity.workspace_id(),
            certificate.agent_id(),
            &certificate.identity_key,
            record,
        )
        .map_err(Error::trust)?;
    let record = record.object();
    if record.attrs.hash() != certificate.attrs {
        return Err(Error::trust("its tags are not those of its certificate"));
    }
    Ok((record.label.clone(), record.attrs.clone()))
}

pub(crate) fn unexpected_reply() -> Error {
    Error::new(ErrorKind::HubUnreachable, "the hub answers something else than was asked")
        .hint("update the older of the hub and this program")
}

/// `web`, `web-2`, `web-3`: by label, then by id, so that everybody sees the same.
fn make_labels_unique(members: &mut [ListedMember]) {
    members.sort_by(|left, right| {
        (&left.own_label, left.info.agent_id).cmp(&(&right.own_label, right.info.agent_id))
    });
    let unique = unique_labels(members.iter().map(|member| member.own_label.as_str()));
    for (member, label) in members.iter_mut().zip(unique) {
        member.info.label = label;
    }
}

/// Labels with a number behind each but the first of its kind; one that somebody chose is no such number.
fn unique_labels<'l>(own: impl Iterator<Item = &'l str> + Clone) -> Vec<String> {
    let chosen: BTreeSet<_> = own.clone().map(str::to_owned).collect();
    let mut last: BTreeMap<&str, u32> = BTreeMap::new();
    let numbered = |label: &'l str| {
        let Some(number) = last.get_mut(label) else {
            last.insert(label, 1);
            return label.to_owned();
        };
        loop {
            *number += 1;
            let numbered = format!("{label}-{number}");
            if !chosen.contains(&numbered) {
                return numbered;
            }
        }
    };
    own.map(numbered).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_unique_and_those_that_were_chosen_stay() {
        let check = |own: &[&str], expected: &[&str]| {
            assert_eq!(unique_labels(own.iter().copied()), expected);
        };
        check(&["db", "web", "web", "web"], &["db", "web", "web-2", "web-3"]);
        check(&["web", "web", "web-2", "web-2"], &["web", "web-3", "web-2", "web-2-2"]);
        check(&[], &[]);
    }
}
