//! What the hub remembers, in PostgreSQL, isolated by workspace.
//!
//! [`WorkspaceTx`] is the only door: it begins a transaction and sets `connect.workspace_id` inside it,
//! which the row security of every table compares with. The server's role owns nothing and cannot
//! bypass row security; [`Store::connect`] refuses any other. Queries name the workspace as well, so
//! each of the two locks holds alone. SQL names the schema, so no search path matters.

mod agents;
mod api_keys;
mod audit;
pub mod catalog;
mod connection;
mod credentials;
mod health;
mod log;
mod registration;
mod schema;
mod services;
mod shared_services;
mod turns;
mod workspaces;
mod wraps;

use std::time::Duration;

pub use agents::{AgentLogin, KnownAgent, Upserted};
pub use api_keys::{Authorized, key_id};
pub use audit::{AuditBounds, AuditFilter};
use connect_spec::ids::WorkspaceId;
pub use connection::open;
pub use credentials::{CredentialRow, NewCredential, Opening};
pub use registration::create_token;
pub use schema::{latest_version, migrate, migrate_to, version};
pub use services::Exposed;
use sqlx::{
    Connection as _, Postgres, Transaction,
    migrate::MigrateError,
    postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions},
};
use tokio::sync::watch;
use turns::{Turn, Turns};
pub use workspaces::WorkspaceRow;
pub use wraps::UnwrappedRow;

use crate::limits::MAX_CONNECTIONS;

/// The role that the hub serves as.
pub const APP_ROLE: &str = "connect_app";
/// The role that owns the functions that must see a row before the workspace is known.
pub const LOOKUP_ROLE: &str = "connect_lookup";
/// The role that owns the functions which write audit logs; nobody can log in as it.
pub const AUDIT_ROLE: &str = "connect_audit";
/// The role that reads everything, for backups.
pub const BACKUP_ROLE: &str = "connect_backup";

/// A caller that waits longer than this for the database is told that the hub is busy.
const ACQUIRE_LIMIT: Duration = Duration::from_secs(5);
/// No statement of ours takes long: one that does, or a transaction that nobody ends, must not hold locks.
const SESSION_LIMITS: &str =
    "SET statement_timeout = '10s'; SET idle_in_transaction_session_timeout = '30s'";

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is away, or refused the statement.
    #[error("database")]
    Database(#[from] sqlx::Error),
    /// There is no connection to the database.
    #[error("the database cannot be used: {what}")]
    Connect {
        /// In words.
        what: &'static str,
        /// What a person can do about it.
        hint: &'static str,
        /// As the driver says it.
        source: sqlx::Error,
    },
    /// The database is away, and nobody waits for it.
    #[error("the database is away")]
    Away,
    /// The workspace has as many transactions under way as it may.
    #[error("the workspace has too many transactions under way")]
    Crowded,
    /// The schema could not be brought up to date.
    #[error("schema")]
    Migrate(#[from] MigrateError),
    /// A row that this program cannot have written.
    #[error("column `{0}` holds what this hub never writes")]
    Corrupt(&'static str),
    /// The role could see through row security.
    #[error("the hub must not serve as role `{role}`: {why}")]
    Privileged {
        /// The role of the connection.
        role: String,
        /// What it could do.
        why: &'static str,
    },
    /// The schema was never made, or is of an older or newer hub.
    #[error("the database has schema version {found}, this hub needs {wanted}")]
    Version {
        /// The version in the database; 0 when there is none.
        found: i64,
        /// The newest migration that this program knows.
        wanted: i64,
    },
}

impl StoreError {
    /// Whether the same may succeed later, with nothing changed but the time.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            // Classes of SQLSTATE: connection, conflict, resources, operator. All else is about the statement.
            Self::Database(sqlx::Error::Database(error)) => {
                let code = error.code().unwrap_or_default();
                ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class))
            }
            Self::Database(_) | Self::Connect { .. } | Self::Away | Self::Crowded => true,
            Self::Migrate(_)
            | Self::Corrupt(_)
            | Self::Privileged { .. }
            | Self::Version { .. } => false,
        }
    }

    /// What a person can do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Privileged { .. } => Some(
                "give `serve` the URL of role `connect_app`, which `connect-hub migrate` creates; only `migrate` gets the owner's. `connect-hub doctor` says what else is wrong",
            ),
            Self::Version { found, wanted } if found < wanted => {
                Some("run `connect-hub migrate --database-url OWNER_URL`")
            }
            Self::Version { .. } => {
                Some("this database belongs to a newer connect-hub: upgrade this one")
            }
            Self::Connect { hint, .. } => Some(hint),
            Self::Database(_)
            | Self::Away
            | Self::Crowded
            | Self::Migrate(_)
            | Self::Corrupt(_) => None,
        }
    }
}

/// A pool of connections as [`APP_ROLE`].
#[derive(Debug, Clone)]
pub struct Store {
    pool: PgPool,
    up: watch::Sender<bool>,
    turns: Turns,
}

impl Store {
    /// Connects, and refuses a role that row security does not bind or a schema of another version.
    ///
    /// # Errors
    /// [`StoreError::Privileged`], [`StoreError::Version`], [`StoreError::Database`].
    pub async fn connect(options: PgConnectOptions) -> Result<Self, StoreError> {
        open(&options).await?.close().await?;
        let pool = PgPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(ACQUIRE_LIMIT)
            .after_connect(|connection, _| {
                Box::pin(async move {
                    sqlx::raw_sql(SESSION_LIMITS).execute(connection).await?;
                    Ok(())
                })
            })
            .connect_with(options)
            .await?;
        let store = Self { pool, up: watch::Sender::new(true), turns: Turns::default() };
        store.check_role().await?;
        let (found, wanted) = (version(&mut *store.pool.acquire().await?).await?, latest_version());
        if found != wanted {
            return Err(StoreError::Version { found, wanted });
        }
        Ok(store)
    }

    async fn check_role(&self) -> Result<(), StoreError> {
        // A role may also become any role that it is a member of, so those count as much as itself.
        let (role, over_everything, creates_roles, owns, reads_all): (
            String,
            bool,
            bool,
            bool,
            bool,
        ) = sqlx::query_as(
            "SELECT current_user::text,
                    bool_or(r.rolsuper OR r.rolbypassrls OR r.rolreplication OR r.rolname IN
                        ('pg_execute_server_program', 'pg_read_server_files', 'pg_write_server_files')),
                    bool_or(r.rolcreaterole),
                    EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                            WHERE n.nspname = 'connect' AND pg_has_role(current_user, c.relowner, 'MEMBER'))
                    OR EXISTS (SELECT FROM pg_namespace n
                               WHERE n.nspname = 'connect' AND pg_has_role(current_user, n.nspowner, 'MEMBER'))
                    OR EXISTS (SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                               WHERE n.nspname = 'connect' AND pg_has_role(current_user, p.proowner, 'MEMBER')),
                    bool_or(r.rolname = 'connect_backup')
             FROM pg_roles r WHERE pg_has_role(current_user, r.oid, 'MEMBER')",
        )
        .fetch_one(&self.pool)
        .await?;
        let why = if over_everything {
            "it is a superuser, may replicate, reaches the server's files, or bypasses row security"
        } else if creates_roles {
            "it can create roles and so become another one"
        } else if owns {
            "it owns a part of the schema"
        } else if reads_all {
            "it can become connect_backup, which reads all workspaces"
        } else {
            return Ok(());
        };
        Err(StoreError::Privileged { role, why })
    }

    /// Whether PostgreSQL answers.
    ///
    /// # Errors
    /// [`StoreError::Database`] when it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT").execute(&self.pool).await?;
        Ok(())
    }

    /// How many connections to PostgreSQL there are, and how many of them rest.
    #[must_use]
    pub fn connections(&self) -> (u32, usize) {
        (self.pool.size(), self.pool.num_idle())
    }

    /// Opens the door to one workspace. Whoever has one open must not open another of the same workspace:
    /// both would wait for a turn that neither gives back.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Away`], [`StoreError::Crowded`].
    pub async fn workspace(&self, workspace: WorkspaceId) -> Result<WorkspaceTx, StoreError> {
        let turn = self.turns.take(workspace).await?;
        Self::enter(self.begin("BEGIN").await?, workspace, turn).await
    }

    /// Begins a transaction, on a task of its own. A caller that goes away while `BEGIN` is on its way
    /// would leave a connection in the pool that has begun and does not know it: its next transaction
    /// would be this one, and read only if this one is.
    async fn begin(
        &self,
        statement: &'static str,
    ) -> Result<Transaction<'static, Postgres>, StoreError> {
        if !self.is_up() {
            return Err(StoreError::Away);
        }
        let pool = self.pool.clone();
        let begun = tokio::spawn(async move { pool.begin_with(statement).await }).await;
        Ok(begun.map_err(|error| sqlx::Error::Io(std::io::Error::other(error)))??)
    }

    async fn enter(
        mut tx: Transaction<'static, Postgres>,
        workspace: WorkspaceId,
        turn: Turn,
    ) -> Result<WorkspaceTx, StoreError> {
        // Local to the transaction: the pooled session forgets it at its end, however that comes.
        sqlx::query("SELECT set_config('connect.workspace_id', $1, true)")
            .bind(workspace.to_string())
            .execute(&mut *tx)
            .await?;
        Ok(WorkspaceTx { tx, workspace, _turn: turn })
    }

    /// Opens the door to one workspace to look only, at one moment of it.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn snapshot(&self, workspace: WorkspaceId) -> Result<WorkspaceTx, StoreError> {
        let turn = self.turns.take(workspace).await?;
        let tx = self.begin("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        Self::enter(tx, workspace, turn).await
    }

    /// Ends all connections.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

/// One transaction in one workspace. Dropped without [`WorkspaceTx::commit`], it is rolled back.
#[derive(Debug)]
pub struct WorkspaceTx {
    tx: Transaction<'static, Postgres>,
    workspace: WorkspaceId,
    _turn: Turn,
}

impl WorkspaceTx {
    /// The workspace whose rows this transaction sees.
    #[must_use]
    pub fn workspace_id(&self) -> WorkspaceId {
        self.workspace
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// [`StoreError::Database`]; nothing is written then.
    pub async fn commit(self) -> Result<(), StoreError> {
        self.tx.commit().await?;
        Ok(())
    }

    fn connection(&mut self) -> &mut PgConnection {
        &mut self.tx
    }

    /// The first parameter of every statement.
    fn id(&self) -> Vec<u8> {
        self.workspace.0.to_vec()
    }
}

/// Reads a column of fixed length.
fn fixed<const N: usize>(raw: &[u8], column: &'static str) -> Result<[u8; N], StoreError> {
    raw.try_into().map_err(|_| StoreError::Corrupt(column))
}

/// Reads a column that holds an unsigned number.
fn unsigned<T: TryFrom<i64>>(value: i64, column: &'static str) -> Result<T, StoreError> {
    T::try_from(value).map_err(|_| StoreError::Corrupt(column))
}
