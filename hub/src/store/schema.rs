//! The schema by its version: the migrations, and how far a database is.

use sqlx::{migrate::Migrator, postgres::PgConnection};

use super::StoreError;

/// The migrations, in a schema of their own so that a shared database stays tidy.
fn migrator() -> Migrator {
    let mut migrator = sqlx::migrate!();
    migrator.create_schema("connect");
    migrator.dangerous_set_table_name("connect.schema_history");
    migrator
}

/// The schema version that this program serves.
#[must_use]
pub fn latest_version() -> i64 {
    migrator().iter().map(|migration| migration.version).max().unwrap_or(0)
}

/// A function as the migrations make it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Definition {
    /// What makes it again, whatever it is meanwhile.
    pub(super) statement: String,
    /// What stands between its dollars.
    pub(super) body: String,
}

/// The last definition that the migrations have of a function of this signature, of which the name counts:
/// no two have the same.
pub(super) fn definition(signature: &str) -> Option<Definition> {
    let (name, _) = signature.split_once('(')?;
    let migrator = migrator();
    let mut found = None;
    for migration in migrator.iter() {
        for statement in migration.sql.as_str().split("\nCREATE ").skip(1) {
            let statement = statement.strip_prefix("OR REPLACE ").unwrap_or(statement);
            let named = statement.split_once(' ').and_then(|(_, named)| named.strip_prefix(name));
            if !named.is_some_and(|rest| rest.starts_with('(')) {
                continue;
            }
            let mut parts = statement.splitn(3, "$$");
            if let (Some(head), Some(body)) = (parts.next(), parts.next()) {
                let statement = format!("CREATE OR REPLACE {head}$${body}$$;");
                found = Some(Definition { statement, body: body.to_owned() });
            }
        }
    }
    found
}

/// The schema version of the database; 0 when there is none.
///
/// # Errors
/// [`StoreError::Database`].
pub async fn version(connection: &mut PgConnection) -> Result<i64, StoreError> {
    let (there,): (bool,) =
        sqlx::query_as("SELECT to_regclass('connect.schema_history') IS NOT NULL")
            .fetch_one(&mut *connection)
            .await?;
    if !there {
        return Ok(0);
    }
    let (version,) = sqlx::query_as(
        "SELECT coalesce(max(version), 0) FROM connect.schema_history WHERE success",
    )
    .fetch_one(connection)
    .await?;
    Ok(version)
}

/// Brings the schema up to date and creates the roles. `owner` may create schemas and roles.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Migrate`].
pub async fn migrate(owner: &mut PgConnection) -> Result<(), StoreError> {
    migrator().run(owner).await?;
    Ok(())
}

/// Brings an empty or older schema to `version` and no further, for data that was written under it.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_to(owner: &mut PgConnection, version: i64) -> Result<(), StoreError> {
    migrator().run_to(version, owner).await?;
    Ok(())
}
