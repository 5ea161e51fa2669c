//! Rounds in which each way is measured once, and what they say together.

use std::fmt::Write as _;

use serde_json::{Value, json};

/// The numbers of one way in one round, by the names that are compared.
pub(crate) type Numbers = Vec<(&'static str, f64)>;

/// What was measured in rounds, of ways in one order. The first is what the others are compared to.
pub(crate) struct Rounds {
    ways: Vec<&'static str>,
    /// For each round the numbers of each way.
    rounds: Vec<Vec<Numbers>>,
}

impl Rounds {
    pub(crate) fn new(ways: &[&'static str]) -> Self {
        Self {
            ways: ways.to_vec(),
            rounds: Vec::new(),
        }
    }

    /// Adds a round: the numbers of each way, all with the same names.
    pub(crate) fn add(&mut self, round: Vec<Numbers>) {
        assert_eq!(round.len(), self.ways.len(), "each way once");
        self.rounds.push(round);
    }

    /// Returns a number of each way in the last round.
    pub(crate) fn last(&self, name: &str) -> Vec<f64> {
        let ways = self.rounds.last().into_iter().flatten();
        ways.map(|numbers| number(numbers, name)).collect()
    }

    /// Returns the ratio of a number of one way to that of another in each round: the least, the median and the most.
    pub(crate) fn ratio(&self, name: &str, way: usize, to: usize) -> (f64, f64, f64) {
        let rounds = self.rounds.iter();
        let ratio = |round: &Vec<Numbers>| number(&round[way], name) / number(&round[to], name);
        spread(rounds.map(ratio).collect())
    }

    /// Returns a table in Markdown: for each number the median of each way, and the median of each round's ratio to
    /// the first way, with the least and the most.
    pub(crate) fn table(&self) -> String {
        let mut table = String::from("| |");
        let mut line = String::from("\n|---|");
        for way in &self.ways {
            let _ = write!(table, " {way} |");
            line.push_str("---|");
        }
        table.push_str(&line);
        for (name, _) in &self.rounds[0][0] {
            let _ = write!(table, "\n| {name} |");
            for way in 0..self.ways.len() {
                let numbers = self.rounds.iter();
                let numbers = numbers.map(|round| number(&round[way], name)).collect();
                let _ = write!(table, " {:.0}", spread(numbers).1);
                if way > 0 {
                    let (least, median, most) = self.ratio(name, way, 0);
                    let _ = write!(table, ", × {median:.2} ({least:.2} to {most:.2})");
                }
                table.push_str(" |");
            }
        }
        table
    }

    /// Returns all numbers: for each round an object of ways.
    pub(crate) fn json(&self) -> Value {
        let rounds = self.rounds.iter().map(|round| {
            let ways = self.ways.iter().zip(round);
            ways.map(|(way, numbers)| {
                let numbers = numbers.iter();
                let numbers = numbers.map(|(name, value)| ((*name).to_owned(), json!(value)));
                ((*way).to_owned(), numbers.collect())
            })
            .collect()
        });
        Value::Array(rounds.map(Value::Object).collect())
    }
}

fn number(numbers: &Numbers, name: &str) -> f64 {
    let found = numbers.iter().find(|(of, _)| *of == name);
    found.expect("each way has it").1
}

/// Returns the least, the median and the most of some numbers.
pub(crate) fn spread(mut numbers: Vec<f64>) -> (f64, f64, f64) {
    numbers.sort_by(f64::total_cmp);
    let last = numbers.len() - 1;
    let median = f64::midpoint(numbers[last / 2], numbers[numbers.len() / 2]);
    (numbers[0], median, numbers[last])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_one_round_and_not_of_medians() {
        let mut rounds = Rounds::new(&["idle", "busy"]);
        for (idle, busy) in [(1.0, 2.0), (100.0, 300.0), (10.0, 10.0)] {
            rounds.add(vec![vec![("p99", idle)], vec![("p99", busy)]]);
        }
        let table = rounds.table();
        let last = table.lines().last();
        assert_eq!(last, Some("| p99 | 10 | 10, × 2.00 (1.00 to 3.00) |"));
    }

    #[test]
    fn the_median_of_two_is_between_them() {
        assert_eq!(spread(vec![4.0, 1.0]), (1.0, 2.5, 4.0));
    }
}
