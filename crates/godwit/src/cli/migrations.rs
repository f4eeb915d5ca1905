//! `godwit migrate`, `status`, `cancel`, `set-bandwidth` and `set-on-stall`.

use std::process::ExitCode;

use super::{
    arguments::{Migrate, Status},
    client::Client,
    exit::{self, Failure},
    table,
    watch::{self, Watched},
};
use crate::{
    api::{BandwidthRequest, MigrateRequest, Migration, OnStallRequest, Problem, ProblemCode},
    job::OnStall,
    output::{self, Output},
    quantity::{RateLimit, rate, size, time_ms},
};

/// Begins a migration and watches it to its end.
pub(super) async fn migrate(
    client: &Client,
    migrate: Box<Migrate>,
    output: Output,
) -> Result<ExitCode, Failure> {
    let options = migrate.options();
    let request = MigrateRequest { machine: migrate.machine, to: migrate.to, options };
    let migration: Migration = client.post("/v1/migrations", &request).await?;
    if let Some(forecast) = migration.forecast.as_ref().filter(|_| !output.json) {
        output.line(&output::forecast(forecast));
    }
    if migrate.detach {
        output.answer(&migration, |migration| {
            format!("{} is under way; watch it with `godwit status {} --watch`", migration.id, migration.id)
        });
        return Ok(ExitCode::SUCCESS);
    }
    follow(client, &migration, output, false).await
}

/// Shows migrations.
pub(super) async fn status(client: &Client, status: Status, output: Output) -> Result<ExitCode, Failure> {
    let Some(wanted) = status.migration else {
        let migrations: Vec<Migration> = client.get("/v1/migrations").await?;
        if status.watch && (output.json || migrations.iter().any(|migration| migration.report.is_none())) {
            return table::watch(client, migrations, output).await;
        }
        output.answer(&migrations, |migrations| output::migrations(migrations));
        return Ok(ExitCode::SUCCESS);
    };
    let migration = find(client, &wanted).await?;
    match &migration.report {
        None if status.watch => follow(client, &migration, output, true).await,
        Some(report) if status.watch => {
            finish(output, report);
            Ok(exit::of_outcome(report.outcome))
        }
        _ => {
            output.answer(&migration, show);
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Gives a migration up.
pub(super) async fn cancel(client: &Client, wanted: &str, output: Output) -> Result<ExitCode, Failure> {
    let id = find_running(client, wanted).await?;
    let migration: Migration = client.post(&format!("/v1/migrations/{id}/cancel"), &()).await?;
    output.answer(&migration, |migration| format!("{id}: {} goes on where it is", migration.machine));
    Ok(ExitCode::SUCCESS)
}

/// Changes a migration's bandwidth limit.
pub(super) async fn set_bandwidth(
    client: &Client,
    wanted: &str,
    limit: RateLimit,
    output: Output,
) -> Result<ExitCode, Failure> {
    let id = find_running(client, wanted).await?;
    let request = BandwidthRequest { bytes_per_second: limit.0 };
    let migration: Migration = client.put(&format!("/v1/migrations/{id}/bandwidth"), &request).await?;
    output.answer(&migration, |_| match limit.0 {
        Some(bytes) => format!("{id}: no more than {}", rate(bytes)),
        None => format!("{id}: no limit"),
    });
    Ok(ExitCode::SUCCESS)
}

/// Changes what a migration does when the downtime target can't be met.
pub(super) async fn set_on_stall(
    client: &Client,
    wanted: &str,
    on_stall: OnStall,
    output: Output,
) -> Result<ExitCode, Failure> {
    let id = find_running(client, wanted).await?;
    let request = OnStallRequest { on_stall };
    let migration: Migration = client.put(&format!("/v1/migrations/{id}/on-stall"), &request).await?;
    output.answer(&migration, |_| match on_stall {
        OnStall::Wait => format!("{id}: waits until the target can be met"),
        OnStall::Throttle => format!("{id}: slows the guest if the target can't be met"),
        OnStall::Switch => format!("{id}: stops at the shortest pause to be had if the target can't be met"),
        OnStall::Cancel => format!("{id}: gives up if the target can't be met"),
    });
    Ok(ExitCode::SUCCESS)
}

/// Watches a migration; with JSON the report at the end (or, if `as_events`, every event on a line).
async fn follow(
    client: &Client,
    migration: &Migration,
    output: Output,
    as_events: bool,
) -> Result<ExitCode, Failure> {
    match watch::to_the_end(client, migration, output, as_events).await? {
        Watched::Ended(report) => {
            if !(output.json && as_events) {
                finish(output, &report);
            }
            Ok(exit::of_outcome(report.outcome))
        }
        Watched::Left => {
            let Migration { id, machine, .. } = migration;
            eprintln!("\n{id} goes on. Watch: godwit status {id} --watch   Give up: godwit cancel {machine}");
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn finish(output: Output, report: &crate::job::Report) {
    output.answer(report, output::report);
}

/// A migration by its id, or a machine's newest.
async fn find(client: &Client, wanted: &str) -> Result<Migration, Failure> {
    let migrations: Vec<Migration> = client.get("/v1/migrations").await?;
    let found =
        migrations.into_iter().find(|migration| migration.id == wanted || migration.machine == wanted);
    found.ok_or_else(|| {
        let message = format!("there is no migration {wanted}, and no machine {wanted} that ever migrated");
        Problem { code: ProblemCode::NotFound, message }.into()
    })
}

async fn find_running(client: &Client, wanted: &str) -> Result<String, Failure> {
    let migration = find(client, wanted).await?;
    if migration.report.is_some() {
        return Err(Failure::refused(format!("the migration {} is over", migration.id)));
    }
    Ok(migration.id)
}

fn show(migration: &Migration) -> String {
    if let Some(report) = &migration.report {
        return output::report(report);
    }
    let progress = &migration.progress;
    let mut rows = vec![
        ["machine".to_owned(), migration.machine.clone()],
        ["phase".to_owned(), output::phase(migration.phase).to_owned()],
        ["pages".to_owned(), format!("{} of {}", progress.pages_settled, progress.pages_total)],
        ["owed".to_owned(), progress.pages_owed.to_string()],
        ["on the wire".to_owned(), size(progress.wire_bytes)],
        ["rate".to_owned(), rate(progress.rate_bytes_per_second)],
    ];
    rows.extend(progress.predicted_remaining_ms.map(|ms| ["time left".to_owned(), time_ms(ms as f64)]));
    rows.extend(progress.predicted_downtime_ms.map(|ms| ["downtime".to_owned(), time_ms(ms as f64)]));
    output::table(["migration", &migration.id], &rows)
}
