"""A team's board: what one adds is on everybody's page, and on the page of whom it is for there is a notice."""
