//! The table of steps: what was done, what should happen, and what happened.

use std::time::Instant;

#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Row>,
    started: Instant,
}

#[derive(Debug)]
struct Row {
    done: String,
    should: String,
    happened: String,
    good: bool,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            rows: Vec::new(),
            started: Instant::now(),
        }
    }
}

impl Table {
    /// Adds a row for a step.
    pub(crate) fn row(&mut self, done: &str, should: &str, happened: &str, good: bool) {
        println!(
            "  {}  {done}: {happened}",
            if good { "ok   " } else { "WRONG" }
        );
        self.rows.push(Row {
            done: done.to_owned(),
            should: should.to_owned(),
            happened: happened.to_owned(),
            good,
        });
    }

    /// Adds a row for a step that is good if `happened` equals `should`.
    pub(crate) fn same(&mut self, done: &str, should: &str, happened: &str) {
        self.row(done, should, happened, should == happened);
    }

    pub(crate) fn all_good(&self) -> bool {
        !self.rows.is_empty() && self.rows.iter().all(|row| row.good)
    }

    pub(crate) fn print(&self) {
        let width = |cell: fn(&Row) -> &str, most: usize| {
            let longest = self.rows.iter().map(|row| cell(row).chars().count()).max();
            longest.unwrap_or(0).min(most)
        };
        let (done, should) = (width(|row| &row.done, 62), width(|row| &row.should, 46));
        println!(
            "\n     {:<done$}  {:<should$}  what happened",
            "what was done", "what should happen"
        );
        for row in &self.rows {
            let mark = if row.good { "ok" } else { "!!" };
            println!(
                "{mark:<4} {:<done$}  {:<should$}  {}",
                row.done, row.should, row.happened
            );
        }
        let good = self.rows.iter().filter(|row| row.good).count();
        println!(
            "\n{good} of {} steps as expected, in {:.0} s",
            self.rows.len(),
            self.started.elapsed().as_secs_f32()
        );
    }
}
